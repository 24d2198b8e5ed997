"""Decoding methods as the host sees them: functions over a state it never looks into."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.autoregressive import decode
from ssd_jax.decoding.emission import stop_rows
from ssd_jax.decoding.prefill import prefill_chunk
from ssd_jax.decoding.speculative import decode_speculative
from ssd_jax.decoding.state import initial_state
from ssd_jax.drafting.drafter import ModelDrafter, NgramDrafter
from ssd_jax.drafting.ngram import NgramConfig, NgramState, init_ngram, learn_prompt
from ssd_jax.engine.batch import Batch
from ssd_jax.engine.speculation import Speculation
from ssd_jax.kv_cache import init_cache
from ssd_jax.model import Model
from ssd_jax.types import (
    DecodeState,
    KVCache,
    ModelParams,
    SpeculationStats,
    SpeculativeState,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """`advance` runs up to so many steps (rounds) and gives its state back; `stop` ends rows.

    `view` picks what the host reads: the target's state, and statistics if there are any.
    """

    prefill: Callable[[Batch], Any]
    advance: Callable[[Batch, Any, int], Any]
    view: Callable[[Any], tuple[DecodeState, SpeculationStats | None]]
    stop: Callable[[Any, np.ndarray], Any]


def autoregressive(model: Model) -> Method:
    """One token a step."""
    config, params = model.config, model.params
    return Method(
        prefill=lambda batch: _prefill_target(model, batch),
        advance=lambda batch, state, steps: decode(
            config, params, batch.sampling, state, np.int32(steps)
        ),
        view=lambda state: (state, None),
        stop=stop_rows,
    )


def speculative(model: Model, speculation: Speculation) -> Method:
    """A drafter proposes, the target verifies."""
    draft = speculation.draft
    drafter = make_drafter(speculation)
    drafter_params = None if isinstance(draft, NgramConfig) else draft.params

    def prefill(batch: Batch) -> SpeculativeState:
        num_rows, num_slots = batch.tokens.shape
        if isinstance(draft, NgramConfig):
            memory = _learn_prompts(draft, batch.tokens, batch.lengths)
        else:
            dtype = draft.params.embedding.dtype
            cache = _empty_cache(draft.config, num_rows, num_slots, dtype)
            cache = _prefill(draft.config, draft.params, batch, cache)
            memory = dataclasses.replace(cache, lengths=jnp.asarray(batch.lengths - 1))
        return SpeculativeState(
            target=_prefill_target(model, batch),
            drafter=memory,
            stats=_no_stats(num_rows, drafter.draft_len),
        )

    def advance(batch: Batch, state: SpeculativeState, rounds: int) -> SpeculativeState:
        return decode_speculative(
            model.config,
            model.params,
            drafter,
            drafter_params,
            batch.sampling,
            state,
            np.int32(rounds),
            verification=speculation.verification,
        )

    return Method(
        prefill=prefill,
        advance=advance,
        view=lambda state: (state.target, state.stats),
        stop=lambda state, rows: dataclasses.replace(state, target=stop_rows(state.target, rows)),
    )


def make_drafter(speculation: Speculation) -> ModelDrafter | NgramDrafter:
    """The drafter that a speculation describes."""
    if isinstance(speculation.draft, NgramConfig):
        return NgramDrafter(config=speculation.draft)
    return ModelDrafter(
        config=speculation.draft.config,
        draft_len=speculation.draft_len,
        verification=speculation.verification,
    )


def _prefill_target(model: Model, batch: Batch) -> DecodeState:
    """The state after all prompts but their last tokens went through the target."""
    state = initial_state(
        model.config,
        batch.tokens,
        batch.lengths,
        batch.finish,
        dtype=model.params.embedding.dtype,
        num_top_logprobs=batch.num_top_logprobs,
    )
    cache = _prefill(model.config, model.params, batch, state.cache)
    return dataclasses.replace(state, cache=cache)


def _prefill(config: ModelConfig, params: ModelParams, batch: Batch, cache: KVCache) -> KVCache:
    for start, size in batch.chunks:
        tokens = jnp.asarray(batch.tokens[:, start : start + size])
        cache = prefill_chunk(config, params, tokens, cache, np.int32(start))
    return cache


_empty_cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3))


@functools.partial(jax.jit, static_argnames="config")
def _learn_prompts(
    config: NgramConfig, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
) -> NgramState:
    state = init_ngram(config, *tokens.shape)
    return learn_prompt(config, state, tokens, lengths)


def _no_stats(num_rows: int, draft_len: int) -> SpeculationStats:
    return SpeculationStats(
        target_steps=jnp.zeros(num_rows, jnp.int32),
        drafted=jnp.zeros(num_rows, jnp.int32),
        accepted=jnp.zeros(num_rows, jnp.int32),
        accepted_at=jnp.zeros((num_rows, draft_len), jnp.int32),
    )
