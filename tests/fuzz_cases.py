"""What fuzz tests share: which inputs a run tries, which two environment variables change.

SSD_JAX_FUZZ_SEED=7 SSD_JAX_FUZZ_COUNT=20000 uv run pytest tests/fuzz
"""

import faulthandler
import os
import sys

SLOW_COUNT = 10_000
SECONDS_TO_HANG = 60


def numbered(default_count):
    """The numbers of the inputs, of which each is the seed of one, so that it can be repeated.

    An input that takes a minute hangs: the traceback is printed and the run ends.
    """
    first = int(os.environ.get("SSD_JAX_FUZZ_SEED", "0")) * 10**9
    count = int(os.environ.get("SSD_JAX_FUZZ_COUNT", default_count))
    for number in range(first, first + count):
        faulthandler.dump_traceback_later(SECONDS_TO_HANG, exit=True, file=sys.__stderr__)
        yield number
    faulthandler.cancel_dump_traceback_later()
