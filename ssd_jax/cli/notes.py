"""Remarks on stderr beside the output: statistics, what was chosen, what a command did."""

import contextlib
import os
import sys

from ssd_jax.cli.word_wrap import WordWrap

_USUAL_WIDTH = 80
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def note(text: str, *, dim: bool = True) -> None:
    """Print a remark; on a terminal broken at words, and dim if wanted and it can show that."""
    if sys.stderr.isatty():
        wrap = WordWrap(terminal_width)
        text = wrap.push(text) + wrap.flush()
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
        if dim and not is_plain:
            text = f"{_DIM}{text}{_PLAIN}"
    print(text, file=sys.stderr, flush=True)


def terminal_width() -> int:
    """Columns of the terminal as it is now, wherever stdout goes; 80 where there is none."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    return _USUAL_WIDTH
