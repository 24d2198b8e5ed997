"""Errors a user can act on.

Every message says what was expected, what came, and what to do about it. The command line turns any
`SsdJaxError` into that one sentence on stderr and exit code 2; nothing else in the package calls
`exit`.
"""

import reprlib

MAX_MESSAGE = 1000


class SsdJaxError(Exception):
    """Base of all errors this package raises on purpose.

    What a file holds can neither make the message long nor command the terminal.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(printable(message), MAX_MESSAGE))


class ConfigError(SsdJaxError):
    """A model or engine configuration that is unsupported or contradicts itself."""


class CheckpointError(SsdJaxError):
    """A checkpoint that is absent, damaged, incomplete or of an unknown kind."""


class RequestError(SsdJaxError):
    """A prompt or a sampling option that cannot be served as asked."""


class MemoryBudgetError(SsdJaxError):
    """A request that would not fit the device's memory, refused before anything is allocated."""


class DeviceError(SsdJaxError):
    """A program that failed on its device while it was running."""


def shown(value: object, limit: int = 80) -> str:
    """The value as a message shows it: its `repr`, without the middle where that is long."""
    short = reprlib.Repr(maxstring=limit, maxother=limit, maxlong=40, maxlevel=3)
    try:
        return shortened(short.repr(value), limit)
    except Exception:  # of a stranger's class, or an integer of too many digits
        return f"a value of type {type(value).__name__}"


def printable(text: str) -> str:
    """The text with an escape for each character that a terminal would obey rather than show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, limit: int) -> str:
    """The text as `printable`, without its middle if it is longer than the limit."""
    if len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]  # more is never shown, and may be gigabytes
    text = printable(text)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[len(text) - half :]}"
