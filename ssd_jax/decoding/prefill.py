"""Feeding prompts to a cache, in padded chunks."""

import functools

import jax
from jaxtyping import Array, Int

from ssd_jax.config import ModelConfig
from ssd_jax.models.decoder import forward
from ssd_jax.types import KVCache, ModelParams


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_chunk(
    config: ModelConfig,
    params: ModelParams,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    start: Int[Array, ""],
) -> KVCache:
    """The cache with T more tokens of every row in slots start .. start + T - 1.

    Rows that are shorter are fed padding: it lands past their length, where it counts for nothing.
    Lengths are left to the caller. No logits are computed: a prompt's last token is not prefilled
    but becomes the first input of the decode loop.
    """
    _, cache = forward(config, params, tokens, cache, start)
    return cache
