"""`ssd-jax convert`: a Hugging Face checkpoint into our own format."""

import argparse
from pathlib import Path

from ssd_jax.checkpointing.converter import convert
from ssd_jax.cli.model_name import named_folder
from ssd_jax.cli.progress import byte_bars


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_convert` reads."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="folder in the Hugging Face layout, or OWNER/NAME[@REVISION] on the hub",
    )
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="precision of the written weights (default: as stored; float16 becomes float32)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a converted checkpoint that is at DST"
    )


def run_convert(args: argparse.Namespace) -> None:
    """Convert as the arguments say, with a progress bar on stderr and one final line on stdout.

    Raises:
        SsdJaxError: whatever `convert` raises.
    """
    source = named_folder(args.source)
    with byte_bars() as show:
        manifest = convert(
            source, args.destination, args.dtype, overwrite=args.overwrite, progress=show
        )
    print(f"{args.destination}: {manifest.num_params:,} parameters, {manifest.dtype}")
