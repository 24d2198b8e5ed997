"""Plain decoding: one token a step for every row, the whole loop on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.finish import Finish
from ssd_jax.models.decoder import compute_logits, forward
from ssd_jax.sampling import reported_logprobs, sample_tokens, warp
from ssd_jax.types import DecodeState, Logprobs, ModelParams, Sampling


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
        logprobs = record_logprobs(logprobs, shown, token, state.lengths)
    return emit(dataclasses.replace(state, cache=cache, logprobs=logprobs), sampling, token)


def emit(state: DecodeState, sampling: Sampling, token: Int[Array, "B"]) -> DecodeState:
    """The state with one token appended to every running row, and rows that end with it marked."""
    rows = jnp.arange(token.shape[0])
    running = state.finish == Finish.RUNNING
    added = running.astype(jnp.int32)
    kept = jnp.take_along_axis(state.tokens, state.lengths[:, None], axis=1)[:, 0]
    tokens = state.tokens.at[rows, state.lengths].set(jnp.where(running, token, kept))
    lengths = state.lengths + added
    counts = state.output_counts.at[rows, token].add(added)
    at_eos = jnp.any(token[:, None] == sampling.eos_ids, axis=1)
    ended = jnp.where(lengths >= sampling.max_length, Finish.LENGTH, Finish.RUNNING)
    ended = jnp.where(at_eos, Finish.EOS, ended)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, lengths=state.cache.lengths + added),
        tokens=tokens,
        lengths=lengths,
        finish=jnp.where(running, ended, state.finish),
        output_counts=counts,
    )


def record_logprobs(
    logprobs: Logprobs,
    shown: Float[Array, "B V"],
    token: Int[Array, "B"],
    positions: Int[Array, "B"],
) -> Logprobs:
    """The record with the chosen token's and the most likely tokens' log-probabilities added."""
    rows = jnp.arange(token.shape[0])
    chosen = jnp.take_along_axis(shown, token[:, None], axis=1)[:, 0]
    top, top_ids = jax.lax.top_k(shown, logprobs.top.shape[-1])
    return Logprobs(
        chosen=logprobs.chosen.at[rows, positions].set(chosen),
        top=logprobs.top.at[rows, positions].set(top),
        top_ids=logprobs.top_ids.at[rows, positions].set(top_ids),
    )


@functools.partial(jax.jit, donate_argnames="state")
def stop_rows(state: DecodeState, stopped: Array) -> DecodeState:
    """The state with the rows marked in `stopped` [B] ended by the host."""
    running = state.finish == Finish.RUNNING
    return dataclasses.replace(
        state, finish=jnp.where(stopped & running, Finish.STOP, state.finish)
    )
