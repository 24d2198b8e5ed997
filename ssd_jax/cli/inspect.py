"""`ssd-jax inspect`: what a checkpoint folder holds."""

import argparse
from pathlib import Path

from ssd_jax.checkpointing.inspect import describe
from ssd_jax.checkpointing.verify import verify_checkpoint
from ssd_jax.cli.model_name import named_folder
from ssd_jax.cli.progress import byte_bars


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_inspect` reads."""
    parser.add_argument(
        "folder",
        metavar="MODEL",
        type=Path,
        help="checkpoint folder, converted or in the Hugging Face layout, or OWNER/NAME[@REVISION] "
        "on the Hugging Face hub",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="of a converted checkpoint: read every file and compare its hash with the one that "
        "was recorded when it was written",
    )


def run_inspect(args: argparse.Namespace) -> None:
    """Print the account of the folder on stdout, after its files were verified if asked for.

    Raises:
        SsdJaxError: the folder holds no readable checkpoint, or files that have changed.
    """
    folder = named_folder(args.folder)
    account = describe(folder)
    if not args.verify:
        print(account)
        return
    with byte_bars() as show:
        num_files, num_bytes = verify_checkpoint(folder, show)
    print(account)
    print(f"verified: {num_files} files, {num_bytes:,} bytes, all as they were written")
