"""The state that a batch starts decoding from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from ssd_jax.config import ModelConfig
from ssd_jax.kv_cache import init_cache
from ssd_jax.types import DecodeState, Logprobs


@functools.partial(jax.jit, static_argnames=("config", "dtype", "num_top_logprobs"))
def initial_state(
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    finish: Int[Array, "B"],
    *,
    dtype: DTypeLike,
    num_top_logprobs: int | None,
) -> DecodeState:
    """Prompts in place, an empty cache with as many slots as `tokens` has columns, nothing emitted.

    The cache's lengths already say what prefill is about to write: all of a prompt but its last
    token. `num_top_logprobs` None records no log-probabilities at all.
    """
    batch, num_slots = tokens.shape
    cache = init_cache(config, batch, num_slots, dtype)
    logprobs = None
    if num_top_logprobs is not None:
        wide = (batch, num_slots, num_top_logprobs)
        logprobs = Logprobs(
            chosen=jnp.zeros((batch, num_slots), jnp.float32),
            top=jnp.zeros(wide, jnp.float32),
            top_ids=jnp.zeros(wide, jnp.int32),
        )
    return DecodeState(
        cache=dataclasses.replace(cache, lengths=lengths - 1),
        tokens=tokens,
        lengths=lengths,
        finish=finish,
        output_counts=jnp.zeros((batch, config.vocab_size), jnp.int32),
        logprobs=logprobs,
    )
