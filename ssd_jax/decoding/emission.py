"""Appending decided tokens to a batch: the one place where text grows and rows end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssd_jax.decoding.finish import Finish
from ssd_jax.types import NO_TOKEN, DecodeState, Logprobs, Sampling


def emit(
    state: DecodeState,
    sampling: Sampling,
    candidates: Int[Array, "B T"],
    num_candidates: Int[Array, "B"],
) -> DecodeState:
    """The state with each running row's first `num_candidates` tokens appended.

    A row is cut after its first EOS token, before a NO_TOKEN and at its length limit, and marked as
    ended there. The cache's length follows the text's: everything but the last token.
    """
    offsets = jnp.arange(candidates.shape[1], dtype=jnp.int32)
    running = state.finish == Finish.RUNNING
    is_token = candidates != NO_TOKEN
    is_eos = jnp.any(candidates[:, :, None] == sampling.eos_ids[:, None, :], axis=-1)
    is_end = is_eos | ~is_token
    ends_so_far = jnp.cumsum(is_end, axis=1, dtype=jnp.int32)
    ends_before = ends_so_far - is_end.astype(jnp.int32)
    room = sampling.max_length - state.lengths
    limit = jnp.where(running, jnp.minimum(num_candidates, room), 0)
    reached = (offsets < limit[:, None]) & (ends_before == 0)
    emitted = reached & is_token
    lengths = state.lengths + jnp.sum(emitted, axis=1, dtype=jnp.int32)
    ended = jnp.where(lengths >= sampling.max_length, Finish.LENGTH, Finish.RUNNING)
    ended = jnp.where(jnp.any(emitted & is_eos, axis=1), Finish.EOS, ended)
    ended = jnp.where(jnp.any(reached & ~is_token, axis=1), Finish.ERROR, ended)
    rows = jnp.arange(candidates.shape[0], dtype=jnp.int32)[:, None]
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, lengths=lengths - 1),
        tokens=write_where(state.tokens, state.lengths, emitted, candidates),
        lengths=lengths,
        finish=jnp.where(running, ended, state.finish),
        output_counts=state.output_counts.at[rows, candidates].add(emitted.astype(jnp.int32)),
    )


def record_logprobs(
    logprobs: Logprobs,
    shown: Float[Array, "B T V"],
    candidates: Int[Array, "B T"],
    start: Int[Array, "B"],
) -> Logprobs:
    """The record with T positions of every row from start[b] on overwritten.

    Positions past what is then emitted hold leftovers, which the next record replaces.
    """
    chosen = jnp.take_along_axis(shown, candidates[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(shown, logprobs.top.shape[-1])
    everywhere = jnp.ones(candidates.shape, bool)
    return Logprobs(
        chosen=write_where(logprobs.chosen, start, everywhere, chosen),
        top=write_where(logprobs.top, start, everywhere, top),
        top_ids=write_where(logprobs.top_ids, start, everywhere, top_ids),
    )


def write_where(
    buffer: Array, start: Int[Array, "B"], mask: Bool[Array, "B T"], values: Array
) -> Array:
    """The buffer [B S ...] with values [B T ...] in columns start[b] + t wherever mask[b, t]."""
    rows = jnp.arange(buffer.shape[0], dtype=jnp.int32)[:, None]
    columns = start[:, None] + jnp.arange(mask.shape[1], dtype=jnp.int32)
    outside = buffer.shape[1]  # writes there are dropped
    return buffer.at[rows, jnp.where(mask, columns, outside)].set(values, mode="drop")


@functools.partial(jax.jit, donate_argnames="state")
def stop_rows(state: DecodeState, stopped: Bool[Array, "B"]) -> DecodeState:
    """The state with the marked rows ended by the host."""
    running = state.finish == Finish.RUNNING
    return dataclasses.replace(
        state, finish=jnp.where(stopped & running, Finish.STOP, state.finish)
    )
