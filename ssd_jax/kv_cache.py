"""A dense key/value cache with a length per row: write, rewind, gather.

Slots at or past a row's length may hold anything. Rewinding is therefore a change of lengths, and
the next write replaces what was rejected.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ssd_jax.config import ModelConfig
from ssd_jax.types import KVCache


def init_cache(config: ModelConfig, batch_size: int, num_slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache of `num_slots` tokens a row."""
    shape = (batch_size, config.num_kv_heads, num_slots, config.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        lengths=jnp.zeros(batch_size, jnp.int32),
    )


def write_slots(
    buffer: Float[Array, "B K S H"], new: Float[Array, "B T K H"], start: Int[Array, "*B"]
) -> Float[Array, "B K S H"]:
    """The buffer with T new tokens of row b in slots start[b] .. start[b] + T - 1.

    A scalar start is the same for all rows.

    The caller keeps start + T <= S: a write that overhung would be moved, not cut.
    """
    new = new.swapaxes(1, 2).astype(buffer.dtype)
    zero = jnp.int32(0)
    if buffer.shape[0] == 1 or start.ndim == 0:  # a plain slice update, which XLA does in place
        return jax.lax.dynamic_update_slice(buffer, new, (zero, zero, start.reshape(-1)[0], zero))
    return jax.vmap(
        lambda row, update, first: jax.lax.dynamic_update_slice(row, update, (zero, first, zero))
    )(buffer, new, start)


def rewind_cache(cache: KVCache, lengths: Int[Array, "B"]) -> KVCache:
    """The cache with every row cut to `lengths`; a row cannot grow this way."""
    return dataclasses.replace(cache, lengths=jnp.minimum(cache.lengths, lengths))


def gather_rows(cache: KVCache, rows: Int[Array, "B"]) -> KVCache:
    """A cache whose row i is row rows[i] of this one (reordering, forking, dropping rows)."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), cache)
