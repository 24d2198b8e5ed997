"""What `speed` calculates with: times of the parts of a round, and outcomes of verifications.

Times are of the programs that decode, on the devices that hold the weights, one program at a time.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from scipy.optimize import nnls

from ssd_jax.decoding.ssd import prepare, propose
from ssd_jax.engine.batch import Batch, make_batch, make_requests
from ssd_jax.engine.counts import LookupCounts
from ssd_jax.engine.round_times import CONTEXT, measure_pass_times
from ssd_jax.engine.ssd import speculative_speculative
from ssd_jax.engine.ssd_options import SSD, Fallback
from ssd_jax.fan_out import FanOut, branch_layout, uniform_fan_out
from ssd_jax.generation import generate
from ssd_jax.model import Model
from ssd_jax.placement import home
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.tuning.speed import Behaviour, Outcomes, Prediction, Setting, Times, predict_rate
from ssd_jax.types import SpeculatorState

LONGEST_DRAFT = 8  # the longest that is tried
WIDE = 12  # guesses for each number of accepted tokens, to see at which rank bonus tokens come
NARROW = 1  # guesses after a hit, to see misses often enough
MISS_WEIGHTS = (0.7, 0.4, 0.2, 0.1)  # besides 1, which is ordinary sampling
CHAIN = 8  # calls dispatched one after the other, so that waiting for them counts little
REPEATS = 5
_SHAPES = ((1, 1), (1, WIDE), (4, 3), (LONGEST_DRAFT, 1), (LONGEST_DRAFT, WIDE))

type Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """Programs dispatched one after the other, and the state that the first one begins with."""

    links: Callable[[SpeculatorState], SpeculatorState]
    state: SpeculatorState


def measure_times(
    model: Model,
    ssd: SSD,
    params: SamplingParams,
    *,
    batch_size: int = 1,
    clock: Clock = time.perf_counter,
) -> Times:
    """Seconds of the parts of SSD's rounds with this draft, verification and sampling."""
    params = dataclasses.replace(params, ignore_eos=True, stop=(), stop_token_ids=())
    batch = _batch(model, ssd, params, batch_size)
    passes = measure_pass_times(model, range(1, LONGEST_DRAFT + 2), params, batch_size=batch_size)

    def of(draft_len: int, guesses: int, fallback: Fallback = "neural") -> SSD:
        return _with(ssd, draft_len, uniform_fan_out(draft_len, guesses), fallback)

    chains: dict[Any, _Chain] = {
        shape: _prepare_chain(model, of(draft_len=shape[0], guesses=shape[1]), batch)
        for shape in _SHAPES
    }
    chains["hit"] = _propose_chain(model, of(LONGEST_DRAFT, 1), batch, hit=True)
    chains["one"] = _propose_chain(model, of(1, 1), batch, hit=False)
    chains["most"] = _propose_chain(model, of(LONGEST_DRAFT, 1), batch, hit=False)
    chains["ngram"] = _propose_chain(model, of(LONGEST_DRAFT, 1, "ngram"), batch, hit=False)
    seconds = _time_in_turns(chains, batch, home(ssd.draft), clock)
    lookup_s, one_s = seconds["hit"], seconds["one"]
    token_s = max(0.0, seconds["most"] - one_s) / (LONGEST_DRAFT - 1)
    return Times(
        verify_s=without_delays([passes[width] for width in sorted(passes)]),
        lookup_s=lookup_s,
        neural_s=(max(0.0, one_s - lookup_s - token_s), token_s),
        ngram_s=max(0.0, seconds["ngram"] - lookup_s),
        prepare_s=fit_prepare(
            [(k, guesses * (k + 1), seconds[k, guesses]) for k, guesses in _SHAPES]
        ),
    )


def without_delays(seconds: Sequence[float]) -> tuple[float, ...]:
    """Times of ever wider passes, none longer than that of a wider one.

    A wider pass does all that a narrower one does, so what the narrower took more was the machine's
    other work.
    """
    return tuple(np.minimum.accumulate(np.array(seconds)[::-1])[::-1].tolist())


def fit_prepare(measured: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """The a, b, c >= 0 for which a + k (b + c R) is closest to the times, relative to them.

    Each measurement is (draft_len k, branches R, seconds).
    """
    shapes = np.array([(1, k, k * branches) for k, branches, _ in measured], np.float64)
    seconds = np.array([seconds for *_, seconds in measured])
    start, step, branch = nnls(shapes / seconds[:, None], np.ones(len(seconds)))[0].tolist()
    return start, step, branch


def measure_behaviour(
    model: Model,
    ssd: SSD,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams,
    fallback: Fallback,
) -> Behaviour:
    """How the longest drafts come out: after hits with many guesses, after misses with few before.

    Where nothing missed, outcomes after a miss are taken to be as those after a hit.
    """
    wide = uniform_fan_out(LONGEST_DRAFT, WIDE)
    narrow = uniform_fan_out(LONGEST_DRAFT, NARROW)
    own = ssd.verification != "rejection" or params.temperature == 0
    after_hit = _count(model, _with(ssd, LONGEST_DRAFT, wide, fallback), prompts, params)[1]
    often_missing = _with(ssd, LONGEST_DRAFT, FanOut(after_hit=narrow, after_miss=wide), fallback)
    after_miss = _count(model, often_missing, prompts, params)[0]
    if after_miss.lookups == 0:
        after_miss = after_hit
    return Behaviour(
        after_hit=after_hit, after_miss=after_miss, foretold=(own, own and fallback == "neural")
    )


def measure_setting(
    model: Model,
    ssd: SSD,
    setting: Setting,
    times: Times,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams,
    *,
    batch_size: int = 1,
) -> Prediction:
    """The speed of a setting by the hit rate and the accepted tokens that it is seen to have."""
    ssd = dataclasses.replace(
        _with(ssd, setting.draft_len, setting.fan_out, setting.fallback),
        miss_weight=setting.miss_weight,
    )
    counts = _decode(model, ssd, prompts, params)
    accepted = np.sum([one.accepted for one in counts], axis=(0, 1))
    hits, lookups = sum(sum(one.hits) for one in counts), sum(sum(one.lookups) for one in counts)
    tokens = 1 + float(accepted @ np.arange(len(accepted))) / max(1, int(accepted.sum()))
    return predict_rate(times, setting, hits / max(1, lookups), tokens, batch_size)


def read_outcomes(counts: Sequence[LookupCounts], fan_out: FanOut, *, after_hit: bool) -> Outcomes:
    """The outcomes of prepared drafts (or else of the fallback's) that runs counted."""
    kind = int(after_hit)
    guesses = fan_out.after_hit if after_hit else fan_out.after_miss
    depth, rank = branch_layout(guesses, fan_out.num_branches)
    used = depth >= 0
    hits = np.zeros((len(guesses), max(guesses)), np.int64)
    found = np.sum([one.found_at[kind] for one in counts], axis=0)
    hits[depth[used], rank[used]] = found[used]
    return Outcomes(
        accepted=np.sum([one.accepted[kind] for one in counts], axis=0),
        hits_by_rank=hits,
        lookups=sum(one.lookups[kind] for one in counts),
    )


def _with(ssd: SSD, draft_len: int, fan_out: FanOut | tuple[int, ...], fallback: Fallback) -> SSD:
    return dataclasses.replace(ssd, draft_len=draft_len, fan_out=fan_out, fallback=fallback)


def _decode(
    model: Model, ssd: SSD, prompts: Sequence[str | Sequence[int]], params: SamplingParams
) -> list[LookupCounts]:
    """What was looked up for each prompt, decoded one by one (a wide tree takes memory)."""
    counts = []
    for prompt in prompts:
        (completion,) = generate(model, [prompt], params, speculation=ssd)
        if completion.speculation is not None and completion.speculation.lookups is not None:
            counts.append(completion.speculation.lookups)
    return counts


def _count(
    model: Model, ssd: SSD, prompts: Sequence[str | Sequence[int]], params: SamplingParams
) -> tuple[Outcomes, Outcomes]:
    """The outcomes of fallback drafts and of prepared ones."""
    counts, fan_out = _decode(model, ssd, prompts, params), ssd.speculator.fan_out
    return (
        read_outcomes(counts, fan_out, after_hit=False),
        read_outcomes(counts, fan_out, after_hit=True),
    )


def _batch(model: Model, ssd: SSD, params: SamplingParams, batch_size: int) -> Batch:
    """Some text with room for every chain."""
    room = LONGEST_DRAFT + CHAIN
    context = min(model.config.max_context, ssd.draft.config.max_context)
    params = dataclasses.replace(params, max_tokens=room)
    requests = make_requests(
        model, [[0] * max(1, min(CONTEXT, context - room))] * batch_size, params
    )
    return make_batch(model, requests, LONGEST_DRAFT, ssd)


def _prepare_chain(model: Model, ssd: SSD, batch: Batch) -> _Chain:
    run = speculative_speculative(model, ssd).prefill(batch)
    speculator, params, sampling = ssd.speculator, ssd.draft.params, run.draft_sampling

    def links(state: SpeculatorState) -> SpeculatorState:
        for _ in range(CHAIN):
            state = prepare(speculator, params, sampling, state)
        return state

    return _Chain(links=links, state=run.speculator)


def _propose_chain(model: Model, ssd: SSD, batch: Batch, *, hit: bool) -> _Chain:
    """From an outcome on the target's device to the draft there, found or made afresh."""
    run = speculative_speculative(model, ssd).prefill(batch)
    speculator, params, sampling = ssd.speculator, ssd.draft.params, run.draft_sampling
    draft_home, target_home = home(ssd.draft), home(model)
    outcome = jax.device_put(np.zeros((len(batch.lengths), 3), np.int32), target_home)
    start = run.speculator
    if hit:  # every branch is for the outcome that is looked up: nothing accepted, then token 0
        found = jax.device_put(np.zeros(start.prepared.num_accepted.shape, np.int32), draft_home)
        prepared = dataclasses.replace(start.prepared, num_accepted=found)
        start = dataclasses.replace(start, prepared=prepared)

    def links(state: SpeculatorState) -> SpeculatorState:
        for _ in range(CHAIN):
            there = jax.device_put(outcome, draft_home)
            state, message, law = propose(speculator, params, sampling, state, there)
            jax.block_until_ready(jax.device_put((message, law), target_home))
        return state

    return _Chain(links=links, state=start)


def _time_in_turns(
    chains: Mapping[Any, _Chain], batch: Batch, where: Sharding, clock: Clock
) -> dict[Any, float]:
    """Seconds of a link of each chain, each begun with the batch's text.

    The least of repeats after one that compiles: what else the machine does only ever adds. They
    take turns, so that a busy while does not fall on one chain alone.
    """
    states = {name: chain.state for name, chain in chains.items()}
    seconds = dict.fromkeys(chains, math.inf)
    for repeat in range(REPEATS + 1):
        for name, chain in chains.items():
            text = dataclasses.replace(
                states[name].text,
                lengths=jax.device_put(batch.lengths, where),
                finish=jax.device_put(batch.finish, where),
            )
            state = jax.block_until_ready(dataclasses.replace(states[name], text=text))
            started = clock()
            states[name] = jax.block_until_ready(chain.links(state))
            if repeat > 0:
                seconds[name] = min(seconds[name], (clock() - started) / CHAIN)
    return seconds
