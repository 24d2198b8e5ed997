"""When each program of each round of SSD ran, and what that says about overlap.

The host dispatches as when it decodes, not waiting for what it dispatched. Threads of their own
wait for three results of each round and note when each was there: the draft, the outcome, and a
number made from the prepared drafts (which themselves are given away to the next program). A
program begins when what it reads is there:

    propose  with the outcome and the prepared drafts of the round before, not before its dispatch
    verify   with the draft
    prepare  with the draft

so that a hop between the devices counts to the program that waits for it.

How long the programs take with nothing beside them is seen by decoding the same once more in
lockstep: each program is dispatched when the one before has ended.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ssd_jax.decoding.finish import Finish
from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.engine.speculation import check_options, check_pair
from ssd_jax.engine.ssd import Program, begin, has_ended, open_programs, play_round
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams

type ClockNs = Callable[[], int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """From when to when, in seconds since the first dispatch."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowRound:
    """A row that was running: whether its draft had been prepared, and how much of it stood."""

    row: int
    was_hit: bool
    num_accepted: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round: when its programs ran, and what came of its rows."""

    propose: Interval
    verify: Interval
    prepare: Interval
    rows: tuple[RowRound, ...]

    @property
    def is_hit(self) -> bool:
        """Whether no row needed the fallback."""
        return all(row.was_hit for row in self.rows)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSummary:
    """Statistics of a timeline; times are medians in seconds, without first and last round.

    Attributes:
        num_rounds: rounds that count.
        round_s: from the beginning of a round to that of the next.
        hit_s: proposing where every row hit; None if that never happened.
        miss_s: proposing where a row missed; None if that never happened.
        verify_s: verifying.
        prepare_s: preparing.
        overlap_efficiency: the least that a round could take, which is propose and the longer of
            verify and prepare as they take in lockstep, over what it took (medians both); None
            without a lockstep.
        hit_rate: of rows; None without any.
        hit_rate_after_hit: of rows whose draft before was prepared.
        hit_rate_after_miss: of the others.
        mean_accepted: drafted tokens that stood in a round of a row.
        waiting_share: rounds in which the target waited for the preparation.
    """

    num_rounds: int
    round_s: float
    hit_s: float | None
    miss_s: float | None
    verify_s: float
    prepare_s: float
    overlap_efficiency: float | None
    hit_rate: float | None
    hit_rate_after_hit: float | None
    hit_rate_after_miss: float | None
    mean_accepted: float
    waiting_share: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stamps:
    """When a round was dispatched and when its results were there, in nanoseconds of one clock."""

    dispatched: int
    proposed: int
    verified: int
    prepared: int


def record_rounds(
    model: Model,
    ssd: SSD,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams,
    *,
    lockstep: bool = False,
    clock: ClockNs = time.perf_counter_ns,
) -> list[Round]:
    """The rounds of decoding these prompts as one batch, with the programs that `generate` runs.

    In lockstep, every program has the machine to itself. What has to be compiled is compiled by two
    rounds that are not recorded. Stop strings are not looked for.

    Raises:
        RequestError, ConfigError, MemoryBudgetError: as `generate`.
    """
    check_pair(model, ssd.draft)
    requests = make_requests(model, prompts, dataclasses.replace(params, stop=()))
    check_options(ssd.verification, [request.params for request in requests])
    batch = make_batch(model, requests, ssd.draft_len, ssd)
    programs = open_programs(model, ssd)
    with ThreadPoolExecutor(3) as watchers:

        def when(result: jax.Array) -> int:
            jax.block_until_ready(result)
            return clock()

        def decode(most_rounds: int) -> list[_Underway]:
            run = begin(programs, batch)
            jax.block_until_ready(run)
            rounds: list[_Underway] = []

            def watch(program: Program, result: jax.Array) -> None:
                if program == "prepare":
                    result = _mark(result)
                else:
                    rounds[-1].said[program] = result
                seen = watchers.submit(when, result)
                rounds[-1].seen[program] = seen
                if lockstep:
                    seen.result()

            while len(rounds) < most_rounds and not has_ended(run):
                rounds.append(_Underway(dispatched=clock(), seen={}, said={}))
                run = play_round(programs, run, watch)
            return rounds

        decode(2)
        underway = decode(batch.max_steps + 1)
        stamps = [one.stamps for one in underway]
    messages = jax.device_get([one.said["propose"] for one in underway])
    outcomes = jax.device_get([one.said["verify"] for one in underway])
    return lay_out(stamps, messages, outcomes, num_rows=len(requests), lockstep=lockstep)


def lay_out(
    stamps: Sequence[Stamps],
    messages: Sequence[np.ndarray],
    outcomes: Sequence[np.ndarray],
    *,
    num_rows: int,
    lockstep: bool = False,
) -> list[Round]:
    """Rounds from when results were there and what they said (arrays as of `decoding.ssd`).

    In lockstep a preparation begins after the verification, not beside it. Rounds that were
    dispatched before the host saw that all rows had ended are left out.
    """
    rounds: list[Round] = []
    running = np.ones(num_rows, bool)
    free = stamps[0].dispatched if stamps else 0  # when the round before left nothing to wait for
    origin = free

    def seconds(start: int, end: int) -> Interval:
        return Interval(start=(start - origin) / 1e9, end=(end - origin) / 1e9)

    for stamp, message, outcome in zip(stamps, messages, outcomes, strict=True):
        if not running.any():
            break
        start = max(free, stamp.dispatched)
        # A thread may wake up late: nothing ends before what had to come first.
        proposed = max(start, stamp.proposed)
        verified = max(proposed, stamp.verified)
        preparing = verified if lockstep else proposed
        prepared = max(preparing, stamp.prepared)
        free = max(verified, prepared)
        rounds.append(
            Round(
                propose=seconds(start, proposed),
                verify=seconds(proposed, verified),
                prepare=seconds(preparing, prepared),
                rows=tuple(
                    RowRound(
                        row=row,
                        was_hit=bool(message[row, -1]),
                        num_accepted=int(outcome[row, 0]),
                    )
                    for row in np.flatnonzero(running).tolist()
                ),
            )
        )
        running &= outcome[:num_rows, 2] == Finish.RUNNING
    return rounds


def summarize(
    rounds: Sequence[Round], lockstep: Sequence[Round] | None = None
) -> TimelineSummary | None:
    """Statistics of the rounds after the first, None if there are fewer than three.

    `lockstep` are the same rounds, recorded in lockstep.
    """
    if len(rounds) < 3:
        return None
    counted = rounds[1:-1]
    lasted = [
        after.propose.start - one.propose.start for one, after in itertools.pairwise(rounds[1:])
    ]
    efficiency = None
    if lockstep is not None:
        least = [
            one.propose.seconds + max(one.verify.seconds, one.prepare.seconds)
            for one in lockstep[1:-1]
        ]
        efficiency = statistics.median(least) / statistics.median(lasted)
    hits: dict[bool, list[bool]] = {False: [], True: []}
    for before, one in itertools.pairwise(rounds):
        kinds = {row.row: row.was_hit for row in before.rows}
        for row in one.rows:
            hits[kinds[row.row]].append(row.was_hit)
    return TimelineSummary(
        num_rounds=len(counted),
        round_s=statistics.median(lasted),
        hit_s=_median(one.propose.seconds for one in counted if one.is_hit),
        miss_s=_median(one.propose.seconds for one in counted if not one.is_hit),
        verify_s=statistics.median(one.verify.seconds for one in counted),
        prepare_s=statistics.median(one.prepare.seconds for one in counted),
        overlap_efficiency=efficiency,
        hit_rate=_share(hits[False] + hits[True]),
        hit_rate_after_hit=_share(hits[True]),
        hit_rate_after_miss=_share(hits[False]),
        mean_accepted=statistics.fmean(row.num_accepted for one in rounds for row in one.rows),
        waiting_share=statistics.fmean(one.prepare.end > one.verify.end for one in counted),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Underway:
    """A round on its way: when its results are seen, and what the draft and the outcome say."""

    dispatched: int
    seen: dict[Program, Future[int]]
    said: dict[Program, jax.Array]

    @property
    def stamps(self) -> Stamps:
        """When all that happened, waited for."""
        return Stamps(
            dispatched=self.dispatched,
            proposed=self.seen["propose"].result(),
            verified=self.seen["verify"].result(),
            prepared=self.seen["prepare"].result(),
        )


@jax.jit
def _mark(prepared: Int[Array, "B R"]) -> Int[Array, ""]:
    """A number that is there when the array is, and stays when the array is given away."""
    return jnp.max(prepared)


def _median(values: Iterable[float]) -> float | None:
    return statistics.median(listed) if (listed := list(values)) else None


def _share(hits: Sequence[bool]) -> float | None:
    return statistics.fmean(hits) if hits else None
