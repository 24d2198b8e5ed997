"""What the best settings would reach on larger placements, and how much that hangs on assumptions.

Draft lengths, fan-outs and the fallback are chosen anew for every point, in closed form; the chosen
method is then simulated. Plain and synchronous decoding get the target's chips only, so figures are
also told for each chip.
"""

import dataclasses
from collections.abc import Sequence

from bench.simulate import published
from bench.simulate.calibrate import (
    CONTEXT,
    Calibration,
    costs_on_h100,
    fit_acceptance,
)
from bench.simulate.chips import Chip, Latencies, find_shape
from bench.simulate.costs import ChipCosts, EngineTimes, Placement
from bench.simulate.methods import SimulatedMethod
from bench.simulate.outcomes import OutcomeLaws, PowerLaw, geometric_law, power_law_through
from bench.simulate.rounds import Simulated, Work, expected_rate, simulate
from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut, measured_fan_out

DRAFT_LENS = range(1, 11)
GUESSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # for each accepted length, on average
NGRAM_ACCEPTANCE = 0.25
_RUNS = 16  # of one row; fewer of larger batches
_TOKENS = 512
_ANSWERS = 8  # of each row, so that the emptying batch at the end counts little

type Candidate = tuple[SimulatedMethod, OutcomeLaws | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a prediction rests on besides the data sheets."""

    latencies: Latencies
    engine: EngineTimes
    guesses: PowerLaw
    acceptance: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One batch size of one kind of method.

    Attributes:
        kind: "plain", "draft" or "SSD".
        draft_chips: 0 but for SSD.
        low: tokens a second of all rows under the least favourable outcomes, the method chosen for
            them (see `outcome_range`); as simulated without SSD.
        high: under the most favourable.
    """

    kind: str
    chips: int
    draft_chips: int
    rows: int
    method: SimulatedMethod
    simulated: Simulated
    low: float
    high: float

    @property
    def per_row(self) -> float:
        """Tokens a second of one row."""
        return self.simulated.tokens_per_s / self.rows

    @property
    def per_chip(self) -> float:
        """Tokens a second for each chip."""
        return self.simulated.tokens_per_s / self.chips


def known_acceptance(calibration: Calibration, target: str, draft: str) -> tuple[float, str]:
    """The acceptance of a pair, and where it is from.

    Pairs without published figures are taken to agree like Llama 70B and 1B.
    """
    for table in published.TABLES:
        if (table.target, table.draft_model) == (target, draft):
            break
    else:
        table = published.TABLES[0]
    costs = costs_on_h100(
        calibration.latencies, calibration.engine, table.target, table.draft_model
    )
    acceptance = fit_acceptance(costs, table.draft_len, table.draft_mean)
    known = table.target == target and table.draft_model == draft
    origin = "from its published synchronous speed" if known else f"assumed, as of {table.pair}"
    return acceptance, origin


def predict_points(
    placement: Placement, assumptions: Assumptions, batches: Sequence[int], drafts: Sequence[int]
) -> list[Point]:
    """Plain, synchronous and SSD with each number of draft chips, at each batch size.

    Raises:
        RequestError: nothing to predict, or sizes below 1.
    """
    if not batches or not drafts or min(*batches, *drafts) < 1:
        raise RequestError(
            "Batch sizes and numbers of draft chips must be at least 1, got "
            f"{list(batches)} and {list(drafts)}."
        )
    synchronous = synchronous_candidates(assumptions)
    own = ssd_candidates(assumptions)
    extremes = [ssd_candidates(other) for other in outcome_range(assumptions)]
    points = []
    for rows in batches:
        costs = _costs(placement, assumptions, rows)
        for kind, candidates in (("plain", [(SimulatedMethod(), None)]), ("draft", synchronous)):
            point = _simulate_best(candidates, costs, rows)
            speed = point[1].tokens_per_s
            points.append(_point(kind, placement.target_chips, 0, rows, point, (speed, speed)))
        for number in drafts:
            costs = _costs(placement.with_draft_chips(number), assumptions, rows)
            point = _simulate_best(own, costs, rows)
            reached = [point[1].tokens_per_s]
            for candidates in extremes:
                reached.append(_simulate_best(candidates, costs, rows)[1].tokens_per_s)
            chips = placement.target_chips + number
            points.append(_point("SSD", chips, number, rows, point, (min(reached), max(reached))))
    return points


def synchronous_candidates(assumptions: Assumptions) -> list[Candidate]:
    """Every draft length."""
    return [
        (
            SimulatedMethod(draft_len=k),
            _laws(k, assumptions.acceptance, assumptions.guesses, "neural"),
        )
        for k in DRAFT_LENS
    ]


def ssd_candidates(assumptions: Assumptions) -> list[Candidate]:
    """Every draft length, fallback and number of guesses, the guesses where they hit most."""
    candidates: list[Candidate] = []
    fallbacks: tuple[Fallback, ...] = ("neural", "ngram")
    for k in DRAFT_LENS:
        for fallback in fallbacks:
            laws = _laws(k, assumptions.acceptance, assumptions.guesses, fallback)
            for guesses in GUESSES:
                lists = [
                    measured_fan_out(law.accepted[:, None] * law.guessed, guesses * (k + 1))
                    for law in (laws.after_hit, laws.after_miss)
                ]
                method = SimulatedMethod(
                    draft_len=k,
                    fan_out=FanOut(after_hit=lists[0], after_miss=lists[1]),
                    fallback=fallback,
                )
                candidates.append((method, laws))
    return candidates


def outcome_range(assumptions: Assumptions) -> list[Assumptions]:
    """The least and the most favourable share of outcomes that guesses hold.

    Talks say 80 to 90 % with three guesses, readers of the paper's curves decays of 0.5 to 1.5.
    """
    return [
        dataclasses.replace(assumptions, guesses=power_law_through(3, hit_rate, decay))
        for hit_rate, decay in ((0.8, 0.5), (0.9, 1.5))
    ]


def vary(
    placement: Placement, assumptions: Assumptions, rows: int
) -> list[tuple[str, float, float]]:
    """SSD's and synchronous speculation's speed under other assumptions, one changed at a time."""
    engine, latencies = assumptions.engine, assumptions.latencies
    faster = dataclasses.replace(
        engine,
        **{
            field.name: getattr(engine, field.name) / 2 for field in dataclasses.fields(EngineTimes)
        },
    )
    shorter = dataclasses.replace(
        latencies, layer_s=latencies.layer_s / 2, collective_s=latencies.collective_s / 2
    )
    low, high = outcome_range(assumptions)
    less, more = (
        dataclasses.replace(
            assumptions, acceptance=min(0.99, max(0.01, assumptions.acceptance + change))
        )
        for change in (-0.05, 0.05)
    )
    variants = (
        ("as calibrated", assumptions),
        ("engine's own times halved", dataclasses.replace(assumptions, engine=faster)),
        ("layer and all-reduce halved", dataclasses.replace(assumptions, latencies=shorter)),
        ("fan-out 3 holds 80 %, decay 0.5", low),
        ("fan-out 3 holds 90 %, decay 1.5", high),
        ("acceptance 0.05 lower", less),
        ("acceptance 0.05 higher", more),
    )
    results = []
    for name, other in variants:
        costs = _costs(placement, other, rows)
        ssd = best_rate(ssd_candidates(other), costs, rows)[1]
        draft = best_rate(synchronous_candidates(other), costs, rows)[1]
        results.append((name, ssd, draft))
    return results


def best_rate(
    candidates: Sequence[Candidate], costs: ChipCosts, rows: int
) -> tuple[Candidate, float]:
    """The candidate with the highest speed in the long run, and that speed."""
    rates = [expected_rate(method, costs, laws, rows) for method, laws in candidates]
    best = max(range(len(rates)), key=rates.__getitem__)
    return candidates[best], rates[best]


def _simulate_best(
    candidates: Sequence[Candidate], costs: ChipCosts, rows: int
) -> tuple[SimulatedMethod, Simulated]:
    (method, laws), _ = best_rate(candidates, costs, rows)
    work = Work(rows=rows, answers=_ANSWERS, tokens=_TOKENS, runs=max(2, _RUNS // rows))
    return method, simulate(method, costs, laws, work)


def _point(
    kind: str,
    chips: int,
    draft_chips: int,
    rows: int,
    chosen: tuple[SimulatedMethod, Simulated],
    limits: tuple[float, float],
) -> Point:
    return Point(
        kind=kind,
        chips=chips,
        draft_chips=draft_chips,
        rows=rows,
        method=chosen[0],
        simulated=chosen[1],
        low=limits[0],
        high=limits[1],
    )


def _laws(k: int, acceptance: float, guesses: PowerLaw, fallback: Fallback) -> OutcomeLaws:
    law = geometric_law(k, acceptance, guesses)
    after_miss = geometric_law(k, NGRAM_ACCEPTANCE, guesses) if fallback == "ngram" else law
    return OutcomeLaws(after_hit=law, after_miss=after_miss)


def _costs(placement: Placement, assumptions: Assumptions, rows: int) -> ChipCosts:
    return ChipCosts(
        placement=placement,
        latencies=assumptions.latencies,
        engine=assumptions.engine,
        batch=rows,
    )


def make_placement(
    chip: Chip, target: str, draft: str, target_chips: int, context: int = CONTEXT
) -> Placement:
    """A placement with one draft chip.

    Raises:
        RequestError: a model that is not known, or sizes below 1.
    """
    return Placement(
        chip=chip,
        target=find_shape(target),
        draft=find_shape(draft),
        target_chips=target_chips,
        draft_chips=1,
        context=context,
    )
