"""Where the process of the command line begins and ends, whatever state it is started in.

Only what Python has loaded anyway is imported here, so that Ctrl-C is safe from the first moment on
that is ours: importing JAX takes seconds, and its extensions do not expect a KeyboardInterrupt.
"""

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

INTERRUPTED = 130
_IMPORTING = "<frozen importlib._bootstrap"


def run() -> int:
    """Exit code of the process's own command line (see `cli.main`), Ctrl-C at any moment included.

    Standard streams that are closed are opened on the null device: files that are opened later
    would take their numbers. Only without an output nothing runs.
    """
    catching = catch_interrupts()
    output_is_closed = sys.stdout is None
    _open_closed_streams()
    if output_is_closed:
        print(
            "ssd-jax: error: Standard output is closed; leave it open, or send it to a file or "
            "to /dev/null.",
            file=sys.stderr,
        )
        return 2
    try:
        try:
            if catching:
                signal.signal(signal.SIGINT, _interrupt)
            from ssd_jax.cli.main import main

            return main()
        finally:
            if catching:
                signal.signal(signal.SIGINT, _leave)  # what runs at exit may not be interrupted
    except BaseException as error:
        if _comes_from_interrupt(error):
            return INTERRUPTED
        raise


def catch_interrupts() -> bool:
    """End the process quietly at Ctrl-C; False where that is ignored, as in background jobs.

    A KeyboardInterrupt in a place where Python can only report it would be lost: it ends the
    process as well.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        return handler is _leave
    hook = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _leave()
        hook(unraisable)

    sys.unraisablehook = report
    signal.signal(signal.SIGINT, _leave)
    return True


def _interrupt(number: int, frame: "FrameType | None") -> None:
    """Raise KeyboardInterrupt; leave at once in the middle of an import, which might swallow it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(number: int = 0, frame: "FrameType | None" = None) -> "NoReturn":
    os._exit(INTERRUPTED)


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether an error is a KeyboardInterrupt, or what some library made of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _open_closed_streams() -> None:
    """Open on the null device what of standard input, output and error is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
