"""What the program is busy with while nothing else is to be seen, on stderr.

On a terminal that is one dim line, which goes away when the work is done; elsewhere a line of its
own, and only for what takes long. Quick work leaves no trace.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from ssd_jax.cli.notes import dimmed, terminal_width

TERMINAL_DELAY_S = 0.2
LINE_DELAY_S = 2.0
_ERASE = "\r\x1b[K"


@contextlib.contextmanager
def busy(text: str, *, quiet: bool) -> Iterator[None]:
    """Show the text while the body runs; nothing if quiet."""
    end = begin(text, quiet=quiet)
    try:
        yield
    finally:
        end()


@contextlib.contextmanager
def busy_in_turn(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows its text until it is called again or the body ends."""
    end = _nothing

    def tell(text: str) -> None:
        nonlocal end
        end()
        end = begin(text, quiet=quiet)

    try:
        yield tell
    finally:
        end()


def begin(text: str, *, quiet: bool) -> Callable[[], None]:
    """Show the text from a moment from now on, until the returned function is called."""
    stream: TextIO | None = sys.stderr
    if quiet or stream is None:
        return _nothing
    overwrites = _can_overwrite(stream)
    lock = threading.Lock()
    shown = over = False

    def show() -> None:
        nonlocal shown
        with lock:
            if not over:
                shown = True
                _write(stream, _line(text) if overwrites else f"{text} ...\n")

    def end() -> None:
        nonlocal over
        timer.cancel()
        with lock:
            if shown and overwrites and not over:
                _write(stream, _ERASE)
            over = True

    timer = threading.Timer(TERMINAL_DELAY_S if overwrites else LINE_DELAY_S, show)
    timer.daemon = True
    timer.start()
    return end


def _nothing() -> None:
    """What ends work that is not shown."""


def _can_overwrite(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _line(text: str) -> str:
    """The text, short enough not to be wrapped: only then can it be taken away."""
    return dimmed(f"{text} ..."[: max(1, terminal_width() - 1)])


def _write(stream: TextIO, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody looks any more
        stream.write(text)
        stream.flush()
