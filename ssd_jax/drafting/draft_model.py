"""Drafting with a second, smaller model on its own cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssd_jax.config import ModelConfig
from ssd_jax.models.decoder import compute_logits, forward
from ssd_jax.sampling import Purpose, counts_along_draft, sample_tokens, warp
from ssd_jax.types import DecodeState, Draft, KVCache, ModelParams, Sampling
from ssd_jax.verification import Verification


def draft_tokens(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    target: DecodeState,
    cache: KVCache,
    draft_len: int,
    verification: Verification,
) -> tuple[Draft, KVCache]:
    """`draft_len` tokens for every row, and the draft's cache after them.

    The first step feeds the last two tokens of the text, not one: after a fully accepted draft the
    last but one was drafted but never fed, and its slot would stay empty. Rows whose limit is near
    count fewer tokens, so that draft and bonus token just fill it.

    Under coupled verification the draft uses the target's own noise and needs no law; under
    rejection it draws independently and returns the law it drew from.
    """
    purpose = Purpose.TOKEN if verification == "coupled" else Purpose.DRAFT
    vocab_size = target.output_counts.shape[-1]
    lengths = target.lengths

    def choose(
        hidden: Float[Array, "B D"], drafted: Int[Array, "B J"], step: Array
    ) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
        logits = match_vocabulary(compute_logits(params, hidden[:, None])[:, 0], vocab_size)
        real = jnp.arange(draft_len, dtype=jnp.int32) < step
        counts = counts_along_draft(target.output_counts, jnp.where(real, drafted, -1))[:, -1]
        law = warp(logits, sampling, counts)
        return sample_tokens(law, sampling, lengths + step, purpose), law

    first = jnp.maximum(lengths - 2, 0)
    pair = first[:, None] + jnp.arange(2, dtype=jnp.int32)
    inputs = jnp.take_along_axis(target.tokens, pair, axis=1)
    hidden, cache = forward(config, params, inputs, cache, first)
    newest = (lengths - 1 - first)[:, None, None]
    hidden = jnp.take_along_axis(hidden, newest, axis=1)[:, 0]
    drafted = jnp.zeros((lengths.shape[0], draft_len), jnp.int32)
    token, law = choose(hidden, drafted, jnp.int32(0))
    drafted = drafted.at[:, 0].set(token)

    def step(
        carry: tuple[Array, Array, KVCache], index: Array
    ) -> tuple[tuple[Array, Array, KVCache], Array | None]:
        token, drafted, cache = carry
        hidden, cache = forward(config, params, token[:, None], cache, lengths - 1 + index)
        token, law = choose(hidden[:, 0], drafted, index)
        drafted = drafted.at[:, index].set(token)
        return (token, drafted, cache), law if verification == "rejection" else None

    later = jnp.arange(1, draft_len, dtype=jnp.int32)
    (_, drafted, cache), laws = jax.lax.scan(step, (token, drafted, cache), later)
    if laws is not None:
        laws = jnp.concatenate([law[:, None], laws.swapaxes(0, 1)], axis=1)
    room = sampling.max_length - lengths - 1
    count = jnp.clip(room, 0, draft_len).astype(jnp.int32)
    return Draft(tokens=drafted, count=count, law=laws), cache


def match_vocabulary(logits: Float[Array, "B W"], vocab_size: int) -> Float[Array, "B V"]:
    """Draft logits cut or padded to the target's number of ids (embeddings may be padded apart)."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[:, :vocab_size]
    return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
