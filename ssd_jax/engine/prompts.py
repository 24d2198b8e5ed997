"""Reading prompts: the states that decoding begins with."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Int

from ssd_jax.decoding.prefill import prefill_chunk
from ssd_jax.decoding.state import initial_state
from ssd_jax.drafting.ngram import NgramConfig, NgramState, init_ngram, learn_prompt
from ssd_jax.engine.batch import Batch
from ssd_jax.model import Model
from ssd_jax.placement import home, place_state
from ssd_jax.types import DecodeState


def read_prompts(model: Model, batch: Batch) -> DecodeState:
    """The state after all of the prompts but their last tokens went through the model."""
    state = unread_state(model, batch)
    cache = state.cache
    for start, size in batch.chunks:
        tokens = jax.device_put(batch.tokens[:, start : start + size], home(model))
        first = jax.device_put(np.int32(start), home(model))
        cache = prefill_chunk(model.config, model.params, tokens, cache, first)
    return dataclasses.replace(state, cache=cache)


def unread_state(model: Model, batch: Batch) -> DecodeState:
    """The state of `read_prompts` but for what the cache holds, on the model's devices."""
    tokens, lengths, finish = jax.device_put((batch.tokens, batch.lengths, batch.finish))
    state = initial_state(
        model.config,
        tokens,
        lengths,
        finish,
        dtype=model.params.embedding.dtype,
        num_top_logprobs=batch.num_top_logprobs,
    )
    return place_state(state, model)


def learn_prompts(config: NgramConfig, batch: Batch) -> NgramState:
    """n-gram tables that know the prompts."""
    return _learn(config, *jax.device_put((batch.tokens, batch.lengths)))


@functools.partial(jax.jit, static_argnames="config")
def _learn(config: NgramConfig, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]) -> NgramState:
    state = init_ngram(config, *tokens.shape)
    return learn_prompt(config, state, tokens, lengths)
