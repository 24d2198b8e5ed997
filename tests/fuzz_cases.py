"""What fuzz tests share: odd values, what a sentence is, and which inputs a run tries.

Two environment variables change the latter:

SSD_JAX_FUZZ_SEED=7 SSD_JAX_FUZZ_COUNT=20000 uv run pytest tests/fuzz
"""

import json
import os
import signal

SLOW_COUNT = 10_000
SECONDS_TO_HANG = 60
LONGEST_MESSAGE = 400  # characters, a folder's path left out


class Odd:
    """Breaks whatever looks at it."""

    def __repr__(self):
        raise ValueError("no")

    def __eq__(self, other):
        raise ValueError("no")

    __hash__ = None


class Raw:
    """Text that stands in a JSON file as it is."""

    def __init__(self, text):
        self.text = text


def as_text(content):
    """JSON text of a value that may hold `Raw` ones."""
    raw = []

    def default(value):
        raw.append(value.text)
        return f"@raw{len(raw) - 1}@"

    text = json.dumps(content, default=default)
    for index, one in enumerate(raw):
        text = text.replace(f'"@raw{index}@"', one)
    return text


def assert_sentence(number, error, folder, *names):
    """An input was refused in one short sentence that names its folder or one of its files."""
    message = str(error)
    assert len(message) - len(str(folder)) < LONGEST_MESSAGE, f"input {number}: {message}"
    assert "\n" not in message, f"input {number}: {message}"
    assert any(name in message for name in (str(folder), *names)), f"input {number}: {message}"


def numbered(default_count):
    """The numbers of the inputs, of which each is the seed of one, so that it can be repeated.

    An input that takes a minute hangs, and ends in an error where it does.
    """
    first = int(os.environ.get("SSD_JAX_FUZZ_SEED", "0")) * 10**9
    count = int(os.environ.get("SSD_JAX_FUZZ_COUNT", default_count))
    before = signal.signal(signal.SIGALRM, _raise)
    try:
        for number in range(first, first + count):
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_HANG)
            yield number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Hang(BaseException):
    """Of no kind that the code under test would catch."""


def _raise(number, frame):
    raise Hang(f"An input took {SECONDS_TO_HANG} seconds.")
