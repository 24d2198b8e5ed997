"""What fuzz tests share: which inputs a run tries, which two environment variables change.

SSD_JAX_FUZZ_SEED=7 SSD_JAX_FUZZ_COUNT=20000 uv run pytest tests/fuzz
"""

import os
import signal

SLOW_COUNT = 10_000
SECONDS_TO_HANG = 60


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
