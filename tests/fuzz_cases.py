"""What fuzz tests share: their seed and how many inputs, which two environment variables change.

SSD_JAX_FUZZ_SEED=7 SSD_JAX_FUZZ_COUNT=20000 uv run pytest tests/fuzz
"""

import faulthandler
import os
import random
import sys

SLOW_COUNT = 10_000
SECONDS_TO_HANG = 60


def fuzz_seed():
    return int(os.environ.get("SSD_JAX_FUZZ_SEED", "0"))


def fuzz_count(default):
    return int(os.environ.get("SSD_JAX_FUZZ_COUNT", default))


def numbered(default_count):
    """The number of each input and a random generator of its own, so that one can be repeated.

    An input that takes a minute hangs: the traceback is printed and the run ends.
    """
    for number in range(fuzz_count(default_count)):
        faulthandler.dump_traceback_later(SECONDS_TO_HANG, exit=True, file=sys.__stderr__)
        yield number, random.Random(f"{fuzz_seed()} {number}")
    faulthandler.cancel_dump_traceback_later()
