"""Plain decoding: one token a step for every row, the whole loop on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.emission import emit, record_logprobs
from ssd_jax.decoding.finish import Finish
from ssd_jax.models.decoder import compute_logits, forward
from ssd_jax.sampling import reported_logprobs, sample_tokens, warp
from ssd_jax.types import DecodeState, ModelParams, Sampling


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    state: DecodeState,
    num_steps: Int[Array, ""],
) -> DecodeState:
    """The state after `num_steps` more steps, or as soon as no row is running.

    Exactness: this is the definition that every other decoding method has to reproduce.
    """

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        step, state = carry
        return (step < num_steps) & jnp.any(state.finish == Finish.RUNNING)

    def advance(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        step, state = carry
        return step + 1, decode_step(config, params, sampling, state)

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))[1]


def decode_step(
    config: ModelConfig, params: ModelParams, sampling: Sampling, state: DecodeState
) -> DecodeState:
    """One more token for every running row.

    The last emitted token enters the cache here, and the token it predicts is emitted.
    """
    last = state.lengths - 1
    inputs = jnp.take_along_axis(state.tokens, last[:, None], axis=1)
    hidden, cache = forward(config, params, inputs, state.cache, last)
    logits = compute_logits(params, hidden)[:, 0]
    law = warp(logits, sampling, state.output_counts)
    token = sample_tokens(law, sampling, state.lengths)
    logprobs = state.logprobs
    if logprobs is not None:
        shown = reported_logprobs(logits, sampling, state.output_counts)
        logprobs = record_logprobs(logprobs, shown[:, None], token[:, None], state.lengths)
    state = dataclasses.replace(state, cache=cache, logprobs=logprobs)
    return emit(state, sampling, token[:, None], jnp.ones_like(token))
