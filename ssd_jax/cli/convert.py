"""`ssd-jax convert`: a Hugging Face checkpoint into our own format."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ssd_jax.checkpointing.converter import convert
from ssd_jax.cli.model_name import named_folder


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
    columns = TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        manifest = convert(
            source, args.destination, args.dtype, overwrite=args.overwrite, progress=show
        )
    print(f"{args.destination}: {manifest.num_params:,} parameters, {manifest.dtype}")
