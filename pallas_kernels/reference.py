"""The specification of every attention op: straightforward XLA, float32 softmax, no blocking."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cached_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    """Causal attention of T query tokens over cached keys and values, in the query's dtype.

    Query t of row b sits in slot start[b] + t and sees slots 0 .. start[b] + t. Everything
    inside is float32, whatever the dtypes outside.
    """
    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, num_slots = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    # The queries that share a kv head become rows of one matrix product: [B K G*T H] x [B K H S].
    query = query.reshape(batch, num_tokens, num_kv_heads, group, head_dim)
    rows = query.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, group * num_tokens, head_dim)
    rows, keys32, values32 = (x.astype(jnp.float32) for x in (rows, keys, values))
    scores = jnp.einsum("bkqh,bksh->bkqs", rows, keys32) * jnp.float32(head_dim**-0.5)
    last_visible = start[:, None] + jnp.arange(num_tokens, dtype=start.dtype)
    visible = jnp.arange(num_slots, dtype=start.dtype) <= last_visible[:, :, None]
    scores = scores.reshape(batch, num_kv_heads, group, num_tokens, num_slots)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, num_kv_heads, -1, num_slots)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, values32)
    out = out.reshape(batch, num_kv_heads, group, num_tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, num_tokens, num_heads, head_dim).astype(values.dtype)
