"""Remarks on stderr beside the output: statistics, what was chosen, what a command did."""

import contextlib
import os
import sys

from ssd_jax.cli.word_wrap import WordWrap

_USUAL_WIDTH = 80


def note(text: str, *, dim: bool = True) -> None:
    """Print a remark; on a terminal broken at words, and dim if wanted and it can show that."""
    if sys.stderr.isatty():
        wrap = WordWrap(terminal_width)
        text = wrap.push(text) + wrap.flush()
        text = dimmed(text) if dim else text
    print(text, file=sys.stderr, flush=True)


def dimmed(text: str) -> str:
    """The text as a terminal shows it dim, if it can and the user does not mind."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if is_plain else f"\x1b[2m{text}\x1b[0m"


def terminal_width() -> int:
    """Columns of the terminal as it is now, wherever stdout goes; 80 where there is none."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    return _USUAL_WIDTH
