"""Rounds one after the other, event by event, of many batches at once.

Every row of a batch answers one request after the other; a batch ends when all have. Prefill is
not simulated. Rows come out independently of each other; what a round lasts is common to them, so
one row that misses lets all wait for its fallback.
"""

import dataclasses

import numpy as np

from bench.simulate.costs import Costs
from bench.simulate.methods import SimulatedMethod
from bench.simulate.outcomes import OutcomeLaw, OutcomeLaws
from ssd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is decoded: `runs` times a batch of `rows`, each with `answers` answers of `tokens`."""

    rows: int = 1
    answers: int = 1
    tokens: int = 512
    runs: int = 64

    def __post_init__(self) -> None:
        if min(self.rows, self.answers, self.tokens, self.runs) < 1:
            raise RequestError(f"Rows, answers, tokens and runs must be at least 1, got {self}.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came out, over all runs.

    Attributes:
        tokens_per_s: of all rows of a batch together.
        spread: standard deviation of that over the runs.
        tokens_per_round: of a row, the last round of an answer included.
        hit_rate: share of looked up outcomes that had been prepared; None without SSD.
        round_s: mean length of a round.
        waits: share of rounds in which the target waited for a fallback.
        late: share of rounds in which preparing outlasted verifying.
    """

    tokens_per_s: float
    spread: float
    tokens_per_round: float
    hit_rate: float | None
    round_s: float
    waits: float
    late: float


def simulate(
    method: SimulatedMethod, costs: Costs, laws: OutcomeLaws | None, work: Work, *, seed: int = 0
) -> Simulated:
    """The speed of a method, the same for the same seed.

    Raises:
        RequestError: a method that drafts, without laws of how its drafts come out.
    """
    rng = np.random.default_rng(seed)
    steps = _Steps(method=method, costs=costs, laws=laws)
    shape = (work.runs, work.rows)
    left = np.full(shape, work.tokens)
    answers = np.full(shape, work.answers)
    found = np.zeros(shape, bool)  # whether the draft of the coming round was prepared
    opened = np.zeros(shape, bool)  # whether the answer has had a round
    seconds = np.zeros(work.runs)
    rounds = row_rounds = lookups = hits = waits = late = 0
    while (running := answers > 0).any():
        some = running.any(1)
        missing = (running & ~found).any(1)
        accepted, found_next = steps.outcomes(rng, found)
        length, is_late = steps.round_s(missing)
        seconds += np.where(some, length, 0.0)
        lookups += int((running & opened).sum())
        hits += int((running & found).sum())
        rounds += int(some.sum())
        row_rounds += int(running.sum())
        waits += int((some & missing).sum())
        late += int((some & is_late).sum())
        left -= np.where(running, accepted + 1, 0)
        ended = running & (left <= 0)
        answers -= ended
        left = np.where(ended, work.tokens, left)
        opened = running & ~ended
        found = found_next & opened
    tokens = work.rows * work.answers * work.tokens
    return Simulated(
        tokens_per_s=float(work.runs * tokens / seconds.sum()),
        spread=float(np.std(tokens / seconds)),
        tokens_per_round=work.runs * tokens / row_rounds,
        hit_rate=hits / max(1, lookups) if method.fan_out else None,
        round_s=float(seconds.sum() / rounds),
        waits=waits / rounds if method.fan_out else 0.0,
        late=late / rounds,
    )


class _Steps:
    """How rounds of one method come out and how long they take."""

    def __init__(self, *, method: SimulatedMethod, costs: Costs, laws: OutcomeLaws | None) -> None:
        self._method = method
        self._synchronous_s, self._pace = _round_parts(method, costs)
        self._tables: tuple[_Table, _Table] | None = None
        if method.draft_len:
            if laws is None:
                raise RequestError(
                    "A method that drafts needs to be told how drafts come out, got nothing: give "
                    "an acceptance or a trace."
                )
            fan_out = method.fan_out
            self._tables = (
                _Table.of(laws.after_miss, fan_out.after_miss if fan_out else None, method),
                _Table.of(laws.after_hit, fan_out.after_hit if fan_out else None, method),
            )

    def outcomes(
        self, rng: np.random.Generator, found: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Accepted tokens, and whether the next draft has been prepared."""
        if self._tables is None:
            return np.zeros(found.shape, int), found
        length_draw, guess_draw = rng.random(found.shape), rng.random(found.shape)
        after_miss, after_hit = self._tables
        if self._method.fan_out is None:
            return after_hit.accepted(length_draw), found
        accepted = np.where(
            found, after_hit.accepted(length_draw), after_miss.accepted(length_draw)
        )
        chance = np.where(found, after_hit.hit[accepted], after_miss.hit[accepted])
        return accepted, guess_draw < chance

    def round_s(self, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a round with or without a fallback, and whether preparing outlasts it."""
        if self._pace is None:
            return np.full(missing.shape, self._synchronous_s), np.zeros(missing.shape, bool)
        pace = self._pace
        propose_s = pace.lookup_s + np.where(missing, pace.fallback_s, 0.0)
        return propose_s + pace.busy_s, np.full(missing.shape, pace.late)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """A law as it is drawn from: cumulative chances of lengths, chances of a hit."""

    cumulative: np.ndarray
    hit: np.ndarray

    @classmethod
    def of(
        cls, law: OutcomeLaw, counts: tuple[int, ...] | None, method: SimulatedMethod
    ) -> "_Table":
        if law.draft_len != method.draft_len:
            raise RequestError(
                f"The outcomes are of drafts of {law.draft_len} tokens, got a method with "
                f"{method.draft_len}."
            )
        hit = np.zeros(len(law.accepted)) if counts is None else law.hit_chances(counts)
        return cls(cumulative=np.cumsum(law.accepted)[:-1], hit=hit)

    def accepted(self, draw: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.cumulative, draw, side="right")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a round of SSD lasts: lookup, perhaps a fallback, then both devices at work.

    Attributes:
        busy_s: from the draft's leaving to the outcome's coming back, or to the end of preparing.
        late: whether it is the latter.
    """

    lookup_s: float
    fallback_s: float
    busy_s: float
    late: bool


def ssd_pace(method: SimulatedMethod, costs: Costs) -> Pace:
    """The parts of SSD's rounds. While both devices are at work, both are slower by `overlap`."""
    if method.fan_out is None:
        raise TypeError("Only SSD prepares drafts.")
    verify_s = costs.dispatch_s + costs.verify(method.draft_len)
    prepare_s = costs.host_s + costs.prepare(method.draft_len, method.fan_out.num_branches)
    both_s = min(verify_s, prepare_s) * (costs.overlap - 1)
    target_s, draft_s = verify_s + both_s + 2 * costs.hop_s, prepare_s + both_s
    return Pace(
        lookup_s=costs.lookup_s,
        fallback_s=costs.fall_back(method.fallback, method.draft_len),
        busy_s=max(target_s, draft_s),
        late=draft_s > target_s,
    )


def _round_parts(method: SimulatedMethod, costs: Costs) -> tuple[float, Pace | None]:
    if method.fan_out is not None:
        return 0.0, ssd_pace(method, costs)
    drafting_s = costs.draft(method.draft_len) if method.draft_len else 0.0
    return drafting_s + costs.verify(method.draft_len), None


def expected_rate(
    method: SimulatedMethod, costs: Costs, laws: OutcomeLaws | None, rows: int = 1
) -> float:
    """Tokens a second of a batch in the long run, in closed form.

    With lookups, hops and late preparing at 0 this is Theorem 7 of the Saguaro paper (Corollary 16
    for more rows) times the speed of plain decoding.
    """
    synchronous_s, pace = _round_parts(method, costs)
    if laws is None or not method.draft_len:
        return rows / synchronous_s
    if pace is None or method.fan_out is None:
        return rows * laws.after_hit.tokens_per_round / synchronous_s
    hit_rate = laws.stationary_hit_rate(method.fan_out.after_hit, method.fan_out.after_miss)
    tokens = (
        hit_rate * laws.after_hit.tokens_per_round
        + (1 - hit_rate) * laws.after_miss.tokens_per_round
    )
    waits = 1 - hit_rate**rows
    return rows * tokens / (pace.lookup_s + waits * pace.fallback_s + pace.busy_s)
