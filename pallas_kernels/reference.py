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
    # The queries that share a kv head are multiplied at once: [B K S H] x [B K H G*T]. Keys come
    # first, so that a CPU rearranges the few queries for the product and not the many keys.
    query = query.reshape(batch, num_tokens, num_kv_heads, group, head_dim)
    rows = query.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, group * num_tokens, head_dim)
    rows, keys32, values32 = (x.astype(jnp.float32) for x in (rows, keys, values))
    scores = jnp.einsum("bksh,bkqh->bksq", keys32, rows).swapaxes(2, 3) * jnp.float32(
        head_dim**-0.5
    )
    last_visible = start[:, None] + jnp.arange(num_tokens, dtype=start.dtype)
    visible = jnp.arange(num_slots, dtype=start.dtype) <= last_visible[:, :, None]
    scores = scores.reshape(batch, num_kv_heads, group, num_tokens, num_slots)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, num_kv_heads, -1, num_slots)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, values32)
    out = out.reshape(batch, num_kv_heads, group, num_tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, num_tokens, num_heads, head_dim).astype(values.dtype)


def tree_attention(
    query: Float[Array, "B R N H"],
    trunk_keys: Float[Array, "B K S H"],
    trunk_values: Float[Array, "B K S H"],
    trunk_lengths: Int[Array, "B R"],
    branch_keys: Float[Array, "B K J R H"],
    branch_values: Float[Array, "B K J R H"],
    step: Int[Array, ""],
) -> Float[Array, "B R N H"]:
    """Attention of one token in each of R branches that grow from one trunk, in the query's dtype.

    Branch r of row b sees trunk slots 0 .. trunk_lengths[b, r] - 1 and its own keys of steps
    0 .. step, under one softmax. The trunk is read once for all branches. Everything inside is
    float32.
    """
    batch, num_branches, num_heads, head_dim = query.shape
    num_kv_heads, num_slots = trunk_keys.shape[1], trunk_keys.shape[2]
    group = num_heads // num_kv_heads
    query = query.reshape(batch, num_branches, num_kv_heads, group, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).astype(jnp.float32) * jnp.float32(head_dim**-0.5)
    rows = query.reshape(batch, num_kv_heads, group * num_branches, head_dim)
    scores = jnp.einsum("bksh,bkqh->bksq", trunk_keys.astype(jnp.float32), rows).swapaxes(2, 3)
    scores = scores.reshape(batch, num_kv_heads, group, num_branches, num_slots)
    seen = jnp.arange(num_slots, dtype=trunk_lengths.dtype) < trunk_lengths[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    # A branch's own keys are few: products and sums beat a batch of tiny matrix products.
    own_keys = branch_keys.astype(jnp.float32).swapaxes(2, 3)[:, :, None]  # [B K 1 R J H]
    own_values = branch_values.astype(jnp.float32).swapaxes(2, 3)[:, :, None]
    own = jnp.sum(query[..., None, :] * own_keys, axis=-1)
    written = jnp.arange(own.shape[-1], dtype=step.dtype) <= step
    own = jnp.where(written, own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)
    from_trunk = weights[..., :num_slots].reshape(batch, num_kv_heads, -1, num_slots)
    out = jnp.einsum("bkqs,bksh->bkqh", from_trunk, trunk_values.astype(jnp.float32))
    out = out.reshape(batch, num_kv_heads, group, num_branches, head_dim)
    out = out + jnp.sum(weights[..., num_slots:, None] * own_values, axis=-2)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, num_branches, num_heads, head_dim)
    return out.astype(trunk_values.dtype)
