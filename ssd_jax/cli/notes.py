"""Remarks on stderr beside the output: statistics, what was chosen, what a command did."""

import os
import shutil
import sys

from ssd_jax.cli.word_wrap import WordWrap

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def note(text: str) -> None:
    """Print a remark; on a terminal broken at words, and dim if it can show that."""
    if sys.stderr.isatty():
        wrap = WordWrap(terminal_width)
        text = wrap.push(text) + wrap.flush()
        if not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb":
            text = f"{_DIM}{text}{_PLAIN}"
    print(text, file=sys.stderr, flush=True)


def terminal_width() -> int:
    """Columns of the terminal as it is now."""
    return shutil.get_terminal_size().columns
