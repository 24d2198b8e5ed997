"""Drafting with a second, smaller model on its own cache."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.finish import Finish
from ssd_jax.drafting.drafts import cut_at_failure
from ssd_jax.models.decoder import compute_logits, forward
from ssd_jax.sampling import Purpose, sample_tokens, warp
from ssd_jax.types import DecodeState, Draft, KVCache, ModelParams, Sampling
from ssd_jax.verification import Verification

CATCH_UP_CHUNK = 16


def draft_tokens(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    target: DecodeState,
    cache: KVCache,
    limit: Int[Array, "B"],
    *,
    draft_len: int,
    verification: Verification,
    reshape_law: Callable[[Array, Array], Array] | None = None,
) -> tuple[Draft, KVCache]:
    """`limit` tokens for each row (at most `draft_len`), and the draft's cache after them.

    A row whose logits are not finite drafts no further.

    The first step feeds the last two tokens of the text, not one: after a fully accepted draft the
    last but one was drafted but never fed, and its slot would stay empty. Before it, the cache must
    hold all the others (see `catch_up`). All rows take as many steps as the longest draft, which
    the cache's lengths say afterwards.

    Under coupled and greedy verification the draft uses the target's own noise and needs no law;
    under rejection it draws independently and returns the law it drew from, which may be reshaped
    by a function of the law [B V] and the draft position.
    """
    purpose = Purpose.DRAFT if verification == "rejection" else Purpose.TOKEN
    lengths, num_steps = target.lengths, jnp.max(limit)
    num_rows, vocab_size = target.output_counts.shape
    rows = jnp.arange(num_rows, dtype=jnp.int32)

    def choose(
        hidden: Float[Array, "B D"], counts: Int[Array, "B V"], draft: Draft, step: Array
    ) -> tuple[Int[Array, "B V"], Draft]:
        logits = match_vocabulary(compute_logits(params, hidden[:, None])[:, 0], vocab_size)
        law = warp(logits, sampling, counts)
        law = law if reshape_law is None else reshape_law(law, step)
        token = sample_tokens(law, sampling, lengths + step, purpose)
        laws = None if draft.law is None else draft.law.at[:, step].set(law)
        draft = dataclasses.replace(draft, tokens=draft.tokens.at[:, step].set(token), law=laws)
        return counts.at[rows, jnp.maximum(token, 0)].add(1), draft

    first = jnp.maximum(lengths - 2, 0)
    pair = first[:, None] + jnp.arange(2, dtype=jnp.int32)
    inputs = jnp.take_along_axis(target.tokens, pair, axis=1)
    hidden, cache = forward(config, params, inputs, cache, first)
    newest = (lengths - 1 - first)[:, None, None]
    hidden = jnp.take_along_axis(hidden, newest, axis=1)[:, 0]
    laws = None
    if verification == "rejection":
        laws = jnp.full((num_rows, draft_len, vocab_size), -jnp.inf, jnp.float32)
    draft = Draft(
        tokens=jnp.zeros((num_rows, draft_len), jnp.int32),
        count=limit,
        law=laws,
        drafter=jnp.zeros_like(limit),
    )
    counts, draft = choose(hidden, target.output_counts, draft, jnp.int32(0))

    def step(index: Array, carry: tuple[Array, Draft, KVCache]) -> tuple[Array, Draft, KVCache]:
        counts, draft, cache = carry
        token = jax.lax.dynamic_index_in_dim(draft.tokens, index - 1, axis=1)
        token = jnp.maximum(token, 0)  # behind a NO_TOKEN nothing counts, but ids must be ids
        hidden, cache = forward(config, params, token, cache, lengths - 1 + index)
        counts, draft = choose(hidden[:, 0], counts, draft, index)
        return counts, draft, cache

    _, draft, cache = jax.lax.fori_loop(1, num_steps, step, (counts, draft, cache))
    fed = lengths - 1 + jnp.maximum(num_steps, 1)
    return cut_at_failure(draft), dataclasses.replace(cache, lengths=fed)


def catch_up(
    config: ModelConfig, params: ModelParams, target: DecodeState, cache: KVCache
) -> KVCache:
    """The cache with every running row's text in it, its last two tokens aside.

    Rows fall behind while nothing is drafted for them. They are fed in chunks that never overhang:
    near the end of the slots a chunk begins earlier, among tokens that are in the cache already.
    """
    wanted = target.lengths - 2
    running = target.finish == Finish.RUNNING
    offsets = jnp.arange(CATCH_UP_CHUNK, dtype=jnp.int32)
    last_start = target.tokens.shape[1] - CATCH_UP_CHUNK

    def is_behind(cache: KVCache) -> Array:
        return jnp.any(running & (cache.lengths < wanted))

    def feed(cache: KVCache) -> KVCache:
        start = jnp.minimum(cache.lengths, last_start)
        inputs = jnp.take_along_axis(target.tokens, start[:, None] + offsets, axis=1)
        known = jnp.maximum(cache.lengths, jnp.minimum(start + CATCH_UP_CHUNK, wanted))
        _, cache = forward(config, params, inputs, cache, start)
        return dataclasses.replace(cache, lengths=known)

    return jax.lax.while_loop(is_behind, feed, cache)


def within_context(
    config: ModelConfig, lengths: Int[Array, "B"], limit: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The limits on a draft, cut so that the text with it fits the draft model's own context.

    The target's may be longer: beyond the draft's, the draft model proposes nothing.
    """
    return jnp.clip(limit, 0, jnp.maximum(config.max_context - lengths, 0))


def match_vocabulary(logits: Float[Array, "... W"], vocab_size: int) -> Float[Array, "... V"]:
    """Draft logits cut or padded to the target's number of ids (embeddings may be padded apart)."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocab_size]
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
    return jnp.pad(logits, padding, constant_values=-jnp.inf)
