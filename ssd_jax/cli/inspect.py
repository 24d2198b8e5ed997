"""`ssd-jax inspect`: what a checkpoint folder holds."""

import argparse
from pathlib import Path

from ssd_jax.checkpointing.inspect import describe
from ssd_jax.cli.model_name import named_folder


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_inspect` reads."""
    parser.add_argument(
        "folder",
        metavar="MODEL",
        type=Path,
        help="checkpoint folder, converted or in the Hugging Face layout, or OWNER/NAME[@REVISION] "
        "on the Hugging Face hub",
    )


def run_inspect(args: argparse.Namespace) -> None:
    """Print the account of the folder on stdout.

    Raises:
        SsdJaxError: the folder holds no readable checkpoint.
    """
    print(describe(named_folder(args.folder)))
