"""How many registers the warpgroups of a block may ask for with `setmaxnreg`.

A block owns what it was launched with: the registers of an SM, 64 K, spread over its threads in
steps of 8. Warpgroups trade these among themselves and get no others: who asks for more than the
rest has released waits for ever.
"""

REGISTERS = 64 * 1024  # of an SM, 32 bit each
WARPGROUP_THREADS = 128
_STEP = 8  # registers are given out, and `setmaxnreg` takes them, in multiples of this
_LEAST, _MOST = 24, 256  # what `setmaxnreg` takes


def registers_at_launch(warpgroups: int) -> int:
    """The most registers that each thread of a block can start with."""
    of_a_thread = REGISTERS // (WARPGROUP_THREADS * warpgroups)
    return min(of_a_thread // _STEP * _STEP, _MOST)


def register_budgets(*budgets: int) -> tuple[int, ...]:
    """Registers a thread of each warpgroup asks for, in the order of the warpgroups.

    Raises:
        ValueError: `setmaxnreg` does not take one, or they are together more than the block owns.
    """
    at_launch, warpgroups = registers_at_launch(len(budgets)), len(budgets)
    if any(count % _STEP or not _LEAST <= count <= _MOST for count in budgets) or (
        sum(budgets) > at_launch * warpgroups
    ):
        raise ValueError(
            f"registers must be multiples of {_STEP} from {_LEAST} to {_MOST} that sum to at most "
            f"{at_launch * warpgroups} over {warpgroups} warpgroups, whose threads start with "
            f"{at_launch} each, got {budgets}, which sum to {sum(budgets)}: ask for less."
        )
    return budgets
