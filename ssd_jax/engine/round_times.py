"""Measuring what rounds cost on this machine, for choosing how much to draft."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.autoregressive import decode_step
from ssd_jax.decoding.speculative import verify_round
from ssd_jax.drafting.drafter import ModelDrafter
from ssd_jax.drafting.drafts import point_masses
from ssd_jax.engine.batch import Batch, make_batch, make_requests
from ssd_jax.engine.method import prefill_drafter
from ssd_jax.engine.prompts import unread_state
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.types import DecodeState, ModelParams, Sampling

ROUNDS = 8  # in one dispatch, so that dispatching does not count
REPEATS = 5
CONTEXT = 256  # tokens of text in front of the measured ones, if the model's context holds them


def measure_round_times(
    model: Model,
    speculation: Speculation,
    params: SamplingParams | None = None,
    *,
    batch_size: int = 1,
) -> RoundTimes:
    """Seconds of this speculation's rounds, for `Speculation.round_times`.

    Every pass width is timed, and drafting one token and the most; in between is a straight line.
    Copying n-grams counts for nothing (it takes microseconds, see `bench/ngram_cost.py`).
    """
    adaptive = dataclasses.replace(
        speculation, round_times=_placeholder_times(speculation), exact=False
    )
    passes = measure_pass_times(model, adaptive.widths, params, batch_size=batch_size)
    drafter, longest = adaptive.drafter, adaptive.longest_draft
    rows = []
    for name in drafter.names:
        if name == "draft" and speculation.draft is not None:
            context = min(model.config.max_context, speculation.draft.config.max_context)
            batch = _measured_batch(model, speculation.draft_len, params, batch_size, context)
            one, step_s = _measure_draft(adaptive, batch, unread_state(model, batch))
            own_len = speculation.draft_len
        else:
            one, step_s = 0.0, 0.0
            own_len = longest if speculation.ngram is None else speculation.ngram.max_draft
        seconds = [passes[1]]
        for count in range(1, longest + 1):
            width = min(width for width in adaptive.widths if width > count)
            drafting = one + (count - 1) * step_s if count <= own_len else math.inf
            seconds.append(passes[width] + drafting)
        rows.append(tuple(seconds))
    return RoundTimes(seconds=tuple(rows))


def measure_pass_times(
    model: Model,
    widths: Sequence[int],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 1,
) -> dict[int, float]:
    """Seconds of one pass of the target of each width, verification and emission included."""
    config, weights = model.config, model.params
    batch = _measured_batch(model, max(widths), params, batch_size, config.max_context)
    state = unread_state(model, batch)
    runs = {
        width: functools.partial(_run_passes, config, weights, batch.sampling, state, width=width)
        for width in sorted(set(widths))
    }
    return _seconds_a_round(runs)


def _placeholder_times(speculation: Speculation) -> RoundTimes:
    """Times that make a speculation choose its draft lengths, before any are measured."""
    bare = dataclasses.replace(speculation, round_times=None)
    row = (1.0,) * (bare.longest_draft + 1)
    return RoundTimes(seconds=(row,) * len(bare.drafter.names))


def _measured_batch(
    model: Model, room: int, params: SamplingParams | None, batch_size: int, context: int
) -> Batch:
    """Some text in a context of that size, with room for `room` tokens more."""
    length = max(1, min(CONTEXT, context - room))
    params = dataclasses.replace(params or SamplingParams(), max_tokens=room, stop=())
    requests = make_requests(model, [[0] * length] * batch_size, params)
    return make_batch(model, requests, room)


def _measure_draft(
    speculation: Speculation, batch: Batch, state: DecodeState
) -> tuple[float, float]:
    """Seconds of drafting one token, and of each more."""
    model, length = speculation.draft, speculation.draft_len
    if model is None:
        raise TypeError("Only a speculation with a draft model can be measured here.")
    alone = dataclasses.replace(speculation, ngram=None, round_times=None)
    cache = prefill_drafter(alone, batch)

    runs = {
        count: functools.partial(
            _run_drafts,
            alone.drafter,
            model.params,
            batch.sampling,
            state,
            cache,
            jnp.full((1, len(batch.lengths)), count, jnp.int32),
        )
        for count in {1, length}
    }
    seconds = _seconds_a_round(runs)
    if length == 1:
        return seconds[1], 0.0
    return seconds[1], max(0.0, seconds[length] - seconds[1]) / (length - 1)


def _seconds_a_round(runs: dict[int, Callable[[np.int32], PyTree]]) -> dict[int, float]:
    """Seconds of a round of each kind: the least of repeats in turns, after one that compiles.

    The least, since whatever else the machine does only ever adds.
    """
    seconds = dict.fromkeys(runs, math.inf)
    for run in runs.values():
        jax.block_until_ready(run(np.int32(1)))
    for _ in range(REPEATS):
        for key, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run(np.int32(ROUNDS)))
            seconds[key] = min(seconds[key], (time.perf_counter() - started) / ROUNDS)
    return seconds


@functools.partial(jax.jit, static_argnames=("config", "width"))
def _run_passes(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    state: DecodeState,
    rounds: Int[Array, ""],
    *,
    width: int,
) -> DecodeState:
    """The same pass again and again, its outcome taken back each time."""

    def step(_: Array, current: DecodeState) -> DecodeState:
        if width == 1:
            after = decode_step(config, params, sampling, current)
        else:
            count = jnp.full_like(current.lengths, width - 1)
            tokens = jnp.broadcast_to(current.tokens[:, :1], (len(count), width - 1))
            draft = point_masses(tokens, count)
            after = verify_round(config, params, sampling, current, draft, None, "coupled")[0]
        return dataclasses.replace(after, lengths=state.lengths, finish=state.finish)

    return jax.lax.fori_loop(0, rounds, step, state)


@functools.partial(jax.jit, static_argnames="drafter")
def _run_drafts(
    drafter: ModelDrafter,
    params: ModelParams,
    sampling: Sampling,
    target: DecodeState,
    cache: PyTree,
    limits: Int[Array, "P B"],
    rounds: Int[Array, ""],
) -> PyTree:
    """The same draft again and again."""

    def step(_: Array, cache: PyTree) -> PyTree:
        return drafter.draft(params, sampling, target, cache, limits)[1]

    return jax.lax.fori_loop(0, rounds, step, cache)
