"""Decoding methods as the host sees them: functions over a state it never looks into.

What a program reads besides the state is put on its devices before, so that a dispatch copies
nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree

from ssd_jax.decoding.autoregressive import decode
from ssd_jax.decoding.emission import stop_rows
from ssd_jax.decoding.speculative import decode_speculative
from ssd_jax.drafting.pace import init_pace
from ssd_jax.engine.batch import Batch
from ssd_jax.engine.prompts import learn_prompts, read_prompts
from ssd_jax.engine.speculation import Speculation
from ssd_jax.model import Model
from ssd_jax.placement import home
from ssd_jax.types import (
    DecodeState,
    LookupStats,
    SpeculationStats,
    SpeculativeState,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """`advance` runs up to so many steps (rounds) and gives its state back; `stop` ends rows.

    `view` picks what the host reads: the target's state, and whatever statistics there are.
    """

    prefill: Callable[[Batch], Any]
    advance: Callable[[Batch, Any, int], Any]
    view: Callable[[Any], tuple[DecodeState, SpeculationStats | None, LookupStats | None]]
    stop: Callable[[Any, np.ndarray], Any]


def autoregressive(model: Model) -> Method:
    """One token a step."""
    config, params, small = model.config, model.params, home(model)
    placed = numbers_on(small)
    return Method(
        prefill=lambda batch: read_prompts(model, batch),
        advance=lambda batch, state, steps: decode(
            config, params, batch.sampling, state, placed(steps)
        ),
        view=lambda state: (state, None, None),
        stop=lambda state, rows: stop_rows(state, jax.device_put(rows, small)),
    )


def numbers_on(where: Sharding) -> Callable[[int], jax.Array]:
    """A function that gives whole numbers (int32) as arrays there, each put there once."""
    return functools.cache(lambda number: jax.device_put(np.int32(number), where))


def speculative(model: Model, speculation: Speculation) -> Method:
    """A drafter proposes, the target verifies."""
    draft, drafter = speculation.draft, speculation.drafter
    drafter_params = None if draft is None else draft.params
    small = home(model)
    placed = numbers_on(small)
    times, rate = speculation.round_times, speculation.synthetic_acceptance
    round_s, synthetic_acceptance = jax.device_put(
        (
            None if times is None else np.array(times.seconds, np.float32),
            None if rate is None else np.float32(rate),
        ),
        small,
    )

    def prefill(batch: Batch) -> SpeculativeState:
        # What is not said to be on the devices where the program will leave it compiles it twice.
        stats = no_stats(batch)
        pace = None if times is None else _no_pace(len(drafter.names), len(batch.lengths))
        return SpeculativeState(
            target=read_prompts(model, batch),
            drafter=prefill_drafter(speculation, batch, small),
            stats=jax.device_put(stats, small),
            pace=jax.device_put(pace, small),
        )

    def advance(batch: Batch, state: SpeculativeState, rounds: int) -> SpeculativeState:
        return decode_speculative(
            model.config,
            model.params,
            drafter,
            drafter_params,
            batch.sampling,
            state,
            placed(rounds),
            round_s,
            synthetic_acceptance,
            verification=speculation.verification,
            widths=speculation.widths,
        )

    return Method(
        prefill=prefill,
        advance=advance,
        view=lambda state: (state.target, state.stats, None),
        stop=lambda state, rows: dataclasses.replace(
            state, target=stop_rows(state.target, jax.device_put(rows, small))
        ),
    )


def prefill_drafter(
    speculation: Speculation, batch: Batch, where: Sharding | None = None
) -> PyTree:
    """What a speculation's drafter remembers once it has read the prompts.

    n-gram tables lie `where`, or where JAX puts them.
    """
    tables = None
    if speculation.ngram is not None:
        tables = jax.device_put(learn_prompts(speculation.ngram, batch), where)
    if speculation.draft is None:
        return tables
    cache = read_prompts(speculation.draft, batch).cache
    return cache if tables is None else (tables, cache)


def no_stats(batch: Batch) -> SpeculationStats:
    """The statistics of a batch for which nothing was done yet."""
    return SpeculationStats(rounds=jnp.zeros((*batch.tokens.shape, 3), jnp.int8))


_no_pace = jax.jit(init_pace, static_argnums=(0, 1))
