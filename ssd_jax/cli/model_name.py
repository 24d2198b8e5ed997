"""The folder of a model that a command line names, fetched from the hub if it is there."""

import sys
from pathlib import Path

from ssd_jax.cli.busy import busy
from ssd_jax.hub import model_folder


def named_folder(name: str | Path, *, quiet: bool = False) -> Path:
    """As `model_folder`; where no terminal shows its progress bars, a line says what it does.

    Raises:
        CheckpointError, ConfigError: as `model_folder`.
    """
    has_bars = sys.stderr is not None and sys.stderr.isatty()
    with busy(f"fetching {name} from the Hugging Face hub", quiet=quiet or has_bars):
        return model_folder(name, quiet=quiet)
