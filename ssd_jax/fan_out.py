"""How many guesses of the bonus token to prepare a draft for, by number of accepted tokens.

An outcome of a verification is (num_accepted, bonus_token). A fan-out list says, for 0 to draft_len
accepted tokens, how many bonus tokens are guessed; their sum is what the draft device can build
within one verification. Source: Saguaro paper, section on fan-out (Theorem 12), in closed form.
"""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from ssd_jax.errors import RequestError, shown
from ssd_jax.field_checks import MAX_INT32, Range, check_fields

type Guesses = Annotated[int, Range(f"from 0 to {MAX_INT32}", lambda n: n >= 0)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FanOut:
    """Guesses for 0, 1, ... draft_len accepted tokens, after a hit and after a miss.

    The two differ because a fallback draft is accepted less often than a prepared one.
    """

    after_hit: tuple[Guesses, ...]
    after_miss: tuple[Guesses, ...]

    def __post_init__(self) -> None:
        check_fields(self, "{} of a fan-out")
        for name in ("after_hit", "after_miss"):
            counts = getattr(self, name)
            if sum(counts) == 0:
                raise RequestError(
                    f"{name} of a fan-out must be whole numbers from 0 on, one for each number of "
                    f"accepted tokens and not all 0, got {shown(counts)}."
                )
        if len(self.after_hit) != len(self.after_miss):
            raise RequestError(
                "after_hit and after_miss of a fan-out must be of one length (draft_len + 1), "
                f"got {len(self.after_hit)} and {len(self.after_miss)} numbers."
            )

    @property
    def num_branches(self) -> int:
        """Branches in a tree: the larger of the two sums."""
        return max(sum(self.after_hit), sum(self.after_miss))

    @property
    def most_guesses(self) -> int:
        """The largest number in either list."""
        return max(*self.after_hit, *self.after_miss)


def branch_layout(counts: Sequence[int], num_branches: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth (accepted tokens) and rank (of the guess) of each branch, int32 [R].

    Depths ascend, ranks ascend within a depth. Branches past the counts' sum are for no outcome:
    their depth is -2.
    """
    depth = np.full(num_branches, -2, np.int32)
    rank = np.zeros(num_branches, np.int32)
    pairs = [(j, f) for j, count in enumerate(counts) for f in range(count)]
    depth[: len(pairs)] = [j for j, _ in pairs]
    rank[: len(pairs)] = [f for _, f in pairs]
    return depth, rank


def uniform_fan_out(draft_len: int, guesses: int) -> tuple[int, ...]:
    """The same number of guesses for every number of accepted tokens."""
    return (guesses,) * (draft_len + 1)


def geometric_shares(draft_len: int, budget: float, acceptance: float, decay: float) -> np.ndarray:
    """The real-valued optimum of Theorem 12, float64 [draft_len + 1].

    Lengths are capped geometric with the given acceptance, and the chance that a bonus token is not
    among F guesses falls as F ** -decay.
    """
    if not (0 < acceptance < 1 and decay > 0 and budget > 0):
        raise RequestError(
            "A geometric fan-out needs an acceptance between 0 and 1, a positive decay and a "
            f"positive budget, got {acceptance}, {decay} and {budget}."
        )
    lengths = np.arange(draft_len + 1)
    shares = acceptance ** (lengths / (1 + decay))
    shares[-1] *= (1 - acceptance) ** (-1 / (1 + decay))
    return budget * shares / shares.sum()


def geometric_fan_out(
    draft_len: int, budget: int, acceptance: float, decay: float
) -> tuple[int, ...]:
    """`geometric_shares` as whole numbers of the same sum (largest remainders rounded up)."""
    shares = geometric_shares(draft_len, budget, acceptance, decay)
    counts = np.floor(shares).astype(int)
    by_remainder = np.argsort(-(shares - counts), kind="stable")
    counts[by_remainder[: budget - counts.sum()]] += 1
    return tuple(int(count) for count in counts)


def measured_fan_out(hits_by_rank: np.ndarray, budget: int) -> tuple[int, ...]:
    """The whole numbers of sum `budget` that would have hit most often in what was measured.

    `hits_by_rank[j, f]` counts outcomes with j accepted tokens whose bonus token was guess f. A
    depth's counts are made non-increasing first (ranks are noisy), so that taking the best next
    guess again and again is optimal.
    """
    num_depths, num_ranks = hits_by_rank.shape
    if budget > num_depths * num_ranks:
        raise RequestError(
            f"A budget of {budget} guesses needs counts of as many ranks, got {num_depths} depths "
            f"of {num_ranks} ranks: measure with a wider fan-out."
        )
    gains = np.minimum.accumulate(hits_by_rank, axis=1)
    counts = [0] * num_depths
    heap = [(-gains[j, 0], j) for j in range(num_depths)]
    heapq.heapify(heap)
    for _ in range(budget):
        _, j = heapq.heappop(heap)
        counts[j] += 1
        if counts[j] < num_ranks:
            heapq.heappush(heap, (-gains[j, counts[j]], j))
    return tuple(counts)
