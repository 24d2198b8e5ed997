"""The constants of the published systems: which are assumed, which fitted, and to what.

Two are fitted to speeds: the latency of a layer to one plain decoding, the cost of a branch to one
large batch. The engine's other times are parts of a round that were profiled. Of each pair of
models and each data set the acceptance is fitted to synchronous speculation. All else is predicted.
"""

import dataclasses

from scipy.optimize import root_scalar

from bench.simulate import published
from bench.simulate.chips import Latencies, find_chip, find_shape, pass_s
from bench.simulate.costs import ChipCosts, EngineTimes, Placement
from bench.simulate.methods import SimulatedMethod
from bench.simulate.outcomes import (
    OutcomeLaws,
    PowerLaw,
    acceptance_for,
    geometric_law,
    power_law_through,
)
from bench.simulate.rounds import expected_rate
from ssd_jax.fan_out import FanOut, uniform_fan_out

CONTEXT = 400  # half of an answer of 512 tokens and a prompt
FIT_BATCH = 2  # whose speed tells the acceptance of the reference log's prompts
_ASSUMED = Latencies(
    memory_share=0.85, compute_share=0.6, layer_s=0.0, collective_s=15e-6, step_s=0.3e-3
)
_DECAY = 1.0
_HOP_S = 0.0  # is part of the profiled lookup
_NGRAM_S = 0.1e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One constant with where it is from: a data sheet's reach assumed, profiled, or fitted."""

    name: str
    value: str
    origin: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the published figures say about the engine that made them."""

    latencies: Latencies
    engine: EngineTimes
    guesses: PowerLaw
    constants: tuple[Constant, ...]


def calibrate() -> Calibration:
    """The constants, fitted one after the other."""
    latencies = dataclasses.replace(_ASSUMED, layer_s=_fit_layer_s())
    guesses = power_law_through(published.PROFILED_GUESSES, published.HIT_RATE, _DECAY)
    engine = _profiled_engine(latencies, _fit_branch_s(latencies, guesses))
    return Calibration(
        latencies=latencies,
        engine=engine,
        guesses=guesses,
        constants=_constants(latencies, engine),
    )


def costs_on_h100(
    latencies: Latencies, engine: EngineTimes, target: str, draft: str, batch: int = 1
) -> ChipCosts:
    """The placement of all published figures: four chips and one."""
    placement = Placement(
        chip=find_chip("h100"),
        target=find_shape(target),
        draft=find_shape(draft),
        target_chips=4,
        draft_chips=1,
        context=CONTEXT,
    )
    return ChipCosts(placement=placement, latencies=latencies, engine=engine, batch=batch)


def fit_acceptance(costs: ChipCosts, draft_len: int, tokens_per_s: float) -> float:
    """The acceptance with which synchronous speculation of one row has that speed."""
    round_s = costs.draft(draft_len) + costs.verify(draft_len)
    return acceptance_for(draft_len, tokens_per_s * round_s)


def geometric_laws(draft_len: int, acceptance: float, guesses: PowerLaw) -> OutcomeLaws:
    """Prepared drafts and the draft model's later ones come out alike."""
    law = geometric_law(draft_len, acceptance, guesses)
    return OutcomeLaws(after_hit=law, after_miss=law)


def uniform_ssd(draft_len: int, guesses: int) -> SimulatedMethod:
    """SSD with the same number of guesses everywhere, as in the published runs."""
    counts = uniform_fan_out(draft_len, guesses)
    return SimulatedMethod(draft_len=draft_len, fan_out=FanOut(after_hit=counts, after_miss=counts))


def _fit_layer_s() -> float:
    """From the first table's plain decoding: seconds are linear in it."""
    table = published.TABLES[0]
    shape = find_shape(table.target)
    rest_s = pass_s(shape, find_chip("h100"), _ASSUMED, chips=4, rows=1, kv_tokens=CONTEXT)
    return (1 / table.ar - rest_s) / shape.layers


def _profiled_engine(latencies: Latencies, branch_s: float) -> EngineTimes:
    """The engine whose verification and tree step last what was profiled, with that branch."""
    bare = EngineTimes(
        lookup_s=published.LOOKUP_S,
        hop_s=_HOP_S,
        judge_s=0.0,
        ngram_s=_NGRAM_S,
        glue_s=published.GLUE_S,
        tree_s=0.0,
        branch_s=branch_s,
    )
    draft_len = published.PROFILED_DRAFT_LEN
    branches = published.PROFILED_GUESSES * (draft_len + 1)
    costs = costs_on_h100(latencies, bare, "qwen3-32b", "qwen3-0.6b")
    step_s = (costs.prepare(draft_len, branches) - bare.glue_s) / draft_len
    return dataclasses.replace(
        bare,
        judge_s=published.VERIFY_S - costs.verify(draft_len),
        tree_s=published.TREE_STEP_S - step_s,
    )


def batch_rate(
    latencies: Latencies, engine: EngineTimes, guesses: PowerLaw, acceptance: float, batch: int
) -> float:
    """The reference log's speed at a batch size, in the long run."""
    draft_len = published.BATCH_DRAFT_LEN
    costs = costs_on_h100(latencies, engine, "llama-3.1-70b", "llama-3.2-1b", batch)
    laws = geometric_laws(draft_len, acceptance, guesses)
    return expected_rate(uniform_ssd(draft_len, published.PROFILED_GUESSES), costs, laws, batch)


def fit_batch_acceptance(latencies: Latencies, engine: EngineTimes, guesses: PowerLaw) -> float:
    """The acceptance with which a batch of `FIT_BATCH` has the reference log's speed."""
    goal = published.BATCH_SPEEDS[FIT_BATCH]
    return root_scalar(
        lambda acceptance: batch_rate(latencies, engine, guesses, acceptance, FIT_BATCH) - goal,
        bracket=(0.0, 1.0),
    ).root


def _fit_branch_s(latencies: Latencies, guesses: PowerLaw) -> float:
    """From the reference log's largest batch, with the acceptance of a small one."""
    largest = max(published.BATCH_SPEEDS)

    def excess(branch_s: float) -> float:
        engine = _profiled_engine(latencies, branch_s)
        acceptance = fit_batch_acceptance(latencies, engine, guesses)
        speed = batch_rate(latencies, engine, guesses, acceptance, largest)
        return speed - published.BATCH_SPEEDS[largest]

    return root_scalar(excess, bracket=(0.0, 30e-6), xtol=1e-10).root


def _constants(latencies: Latencies, engine: EngineTimes) -> tuple[Constant, ...]:
    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1e3:.3g} ms"

    def microseconds(seconds: float) -> str:
        return f"{seconds * 1e6:.3g} us"

    profiled = "profiled (reproduction)"
    rows = (
        ("memory bandwidth reached", f"{latencies.memory_share:.0%}", "assumed"),
        ("operations reached", f"{latencies.compute_share:.0%}", "assumed"),
        ("one all-reduce", microseconds(latencies.collective_s), "assumed"),
        ("launching a pass", milliseconds(latencies.step_s), "assumed"),
        ("drafting by n-grams", milliseconds(engine.ngram_s), "assumed"),
        ("decay of misses with guesses", f"{_DECAY:g}", "assumed; no published figure tells it"),
        (
            "outcomes prepared with 3 guesses",
            f"{published.HIT_RATE:.0%}",
            "published (one row, greedy)",
        ),
        ("a layer's kernels", microseconds(latencies.layer_s), "fitted to Llama's plain decoding"),
        ("lookup and messages", milliseconds(engine.lookup_s), profiled),
        ("judging a verification", milliseconds(engine.judge_s), f"{profiled}: verify less pass"),
        ("reading the trunk, guessing", milliseconds(engine.glue_s), profiled),
        (
            "a tree step besides its pass",
            milliseconds(engine.tree_s),
            f"{profiled}: step less pass",
        ),
        ("of that, a branch", microseconds(engine.branch_s), "fitted to the log's batch of 16"),
    )
    return tuple(Constant(name=name, value=value, origin=origin) for name, value, origin in rows)
