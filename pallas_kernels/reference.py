"""The specification of every attention op: straightforward XLA, float32 softmax, no blocking.

Everything inside is float32 whatever the dtypes outside, and outputs have the dtype of the values.
A query that sees no key at all gets zeros, and minus infinity as its LSE.

What slots that nobody sees may hold: keys anything, NaN included. Values in pages (decode, verify,
ancestor, tree) anything too, from the slot after the last that a query of that row sees on: nothing
is written there yet, or a page that nobody cleared. Other values must be finite, since their weight
is 0: clearing those of a dense cache here would cost a pass over all of it. (For gradients, slots
past a row's length may hold anything.)

NaN in a key or value reaches every query that sees it; a NaN in a value may also reach, in its
column, queries of the same kv head that do not see it, since 0 times NaN is NaN. Which of those it
reaches differs between implementations. No other head and no other row is touched.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.registry import Kernel, supports_everything


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The attended values and the natural LSE of the scores; see `ops.attention`."""
    visible = _visible_to_prompt(query.shape[1], key, lengths, start, causal, window)
    keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
    out, lse = _attend(query, keys, values, visible, scale, soft_cap)
    if lengths is not None or window is not None:
        out = _zero_where_blind(out, jnp.any(visible, axis=-1))
    return out, lse


def attention_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    out_gradient: Float[Array, "B T N H"],
    lse_gradient: Float[Array, "B N T"] | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key and value, from what `attention` returned and its gradients.

    Source: FlashAttention-2 (Dao 2023), section 3.1.2: weights are recomputed from the LSE.
    """
    num_kv_heads, dtypes = key.shape[2], (query.dtype, key.dtype, value.dtype)
    visible = _visible_to_prompt(query.shape[1], key, lengths, start, causal, window)
    key, value = zero_past(key, lengths), zero_past(value, lengths)
    query, key, value, out, out_gradient = (
        x.astype(jnp.float32) for x in (query, key, value, out, out_gradient)
    )
    rows, out_rows, row_gradients = (_rows(x, num_kv_heads) for x in (query, out, out_gradient))
    shape = (query.shape[0], num_kv_heads, rows.shape[2], key.shape[1])
    scores = jnp.einsum("bkqh,bskh->bkqs", rows, key) * jnp.float32(scale)
    slope = jnp.float32(1)
    if soft_cap is not None:
        squashed = jnp.tanh(scores / jnp.float32(soft_cap))
        scores, slope = squashed * jnp.float32(soft_cap), 1 - squashed**2
    seen = jnp.tile(visible, (1, rows.shape[2] // query.shape[1], 1))[:, None]
    lse = lse.reshape(*shape[:3], 1).astype(jnp.float32)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(seen, lse, jnp.float32(0))), 0)
    # How much each row's total weight matters: what a softmax takes off every gradient.
    total = jnp.sum(row_gradients * out_rows, axis=-1, keepdims=True)
    if lse_gradient is not None:
        total = total - lse_gradient.reshape(*shape[:3], 1).astype(jnp.float32)
    weight_gradients = jnp.einsum("bkqh,bskh->bkqs", row_gradients, value)
    score_gradients = weights * (weight_gradients - total) * slope * jnp.float32(scale)
    of_query = _tokens(jnp.einsum("bkqs,bskh->bkqh", score_gradients, key), query.shape[1])
    of_key = jnp.einsum("bkqs,bkqh->bskh", score_gradients, rows)
    of_value = jnp.einsum("bkqs,bkqh->bskh", weights, row_gradients)
    return of_query.astype(dtypes[0]), of_key.astype(dtypes[1]), of_value.astype(dtypes[2])


def decode_attention(
    query: Float[Array, "B N H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    page_table: Int[Array, "B P"] | None = None,
) -> Float[Array, "B N H"]:
    """One token a row over the first lengths[b] slots; see `ops.decode_attention`."""
    keys, values = (in_slot_order(x, page_table) for x in (keys, values))
    slots = jnp.arange(keys.shape[2], dtype=lengths.dtype)
    visible = slots < lengths[:, None, None]
    out, _ = _attend(
        query[:, None], keys, _zero_unseen(values, visible, page_table), visible, scale
    )
    return _zero_where_blind(out, lengths[:, None] > 0)[:, 0]


def verify_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    start: Int[Array, "B"],
    *,
    scale: float,
    page_table: Int[Array, "B P"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of T tokens that sit in slots start + t; see `ops.verify_attention`."""
    keys, values = (in_slot_order(x, page_table) for x in (keys, values))
    last_visible = start[:, None] + jnp.arange(query.shape[1], dtype=start.dtype)
    visible = jnp.arange(keys.shape[2], dtype=start.dtype) <= last_visible[:, :, None]
    return _attend(query, keys, _zero_unseen(values, visible, page_table), visible, scale)[0]


def ancestor_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    prefix: Int[Array, "B"],
    ancestors: UInt32[Array, "B T 2"],
    *,
    scale: float,
    page_table: Int[Array, "B P"] | None = None,
) -> Float[Array, "B T N H"]:
    """Tokens of a tree over its prefix and their ancestors; see `ops.ancestor_attention`."""
    keys, values = (in_slot_order(x, page_table) for x in (keys, values))
    node = jnp.arange(keys.shape[2], dtype=prefix.dtype) - prefix[:, None]
    node = node[:, None]  # [B 1 S]
    low, high = ancestors[:, :, :1], ancestors[:, :, 1:]
    bits = jnp.where(node < 32, low, high) >> (node % 32).astype(jnp.uint32)
    is_ancestor = (node >= 0) & (node < 64) & (bits % 2 == 1)
    visible = (node < 0) | is_ancestor
    out, _ = _attend(query, keys, _zero_unseen(values, visible, page_table), visible, scale)
    return _zero_where_blind(out, jnp.any(visible, axis=-1))


def tree_attention(
    query: Float[Array, "B R N H"],
    trunk_keys: Float[Array, "X K Z H"],
    trunk_values: Float[Array, "X K Z H"],
    trunk_lengths: Int[Array, "B R"],
    branch_keys: Float[Array, "B K J R H"],
    branch_values: Float[Array, "B K J R H"],
    step: Int[Array, ""],
    *,
    scale: float,
    page_table: Int[Array, "B P"] | None = None,
) -> Float[Array, "B R N H"]:
    """One token in each of R branches that grow from one trunk; see `ops.tree_attention`."""
    trunk_keys, trunk_values = (in_slot_order(x, page_table) for x in (trunk_keys, trunk_values))
    batch, num_branches, num_heads, head_dim = query.shape
    num_kv_heads, num_slots = trunk_keys.shape[1], trunk_keys.shape[2]
    group = num_heads // num_kv_heads
    query = query.reshape(batch, num_branches, num_kv_heads, group, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).astype(jnp.float32) * jnp.float32(scale)
    rows = query.reshape(batch, num_kv_heads, group * num_branches, head_dim)
    scores = jnp.einsum("bksh,bkqh->bksq", trunk_keys.astype(jnp.float32), rows).swapaxes(2, 3)
    scores = scores.reshape(batch, num_kv_heads, group, num_branches, num_slots)
    seen = jnp.arange(num_slots, dtype=trunk_lengths.dtype) < trunk_lengths[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    trunk_values = _zero_unseen(trunk_values, seen, page_table)
    # A branch's own keys are few: products and sums beat a batch of tiny matrix products.
    own_keys = branch_keys.astype(jnp.float32).swapaxes(2, 3)[:, :, None]  # [B K 1 R J H]
    own_values = branch_values.astype(jnp.float32).swapaxes(2, 3)[:, :, None]
    own = jnp.sum(query[..., None, :] * own_keys, axis=-1)
    written = jnp.arange(own.shape[-1], dtype=step.dtype) <= step
    own = jnp.where(written, own, -jnp.inf)
    own_values = jnp.where(written[:, None], own_values, jnp.float32(0))
    weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)
    from_trunk = weights[..., :num_slots].reshape(batch, num_kv_heads, -1, num_slots)
    out = jnp.einsum("bkqs,bksh->bkqh", from_trunk, trunk_values.astype(jnp.float32))
    out = out.reshape(batch, num_kv_heads, group, num_branches, head_dim)
    out = out + jnp.sum(weights[..., num_slots:, None] * own_values, axis=-2)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, num_branches, num_heads, head_dim)
    return out.astype(trunk_values.dtype)


def zero_past(
    x: Float[Array, "B S K H"], lengths: Int[Array, "B"] | None
) -> Float[Array, "B S K H"]:
    """X with zeros in the slots from lengths[b] on; as it is without lengths."""
    if lengths is None:
        return x
    exists = jnp.arange(x.shape[1], dtype=lengths.dtype) < lengths[:, None]
    return jnp.where(exists[:, :, None, None], x, jnp.zeros((), x.dtype))


def in_slot_order(
    cache: Float[Array, "X K Z H"], page_table: Int[Array, "B P"] | None
) -> Float[Array, "B K S H"]:
    """The cache of each row, gathered from its pages; without a page table the cache itself."""
    if page_table is None:
        return cache
    pages = cache[page_table].swapaxes(1, 2)  # [B K P Z H]
    return pages.reshape(*pages.shape[:2], -1, pages.shape[4])


def _attend(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B T S"],
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention of each query to the slots it sees, and the natural LSE; NaN if that is none."""
    batch, num_tokens, num_heads, _ = query.shape
    num_kv_heads, num_slots = keys.shape[1], keys.shape[2]
    # The queries that share a kv head are multiplied at once: [B K S H] x [B K H G*T]. Keys come
    # first, so that a CPU rearranges the few queries for the product and not the many keys.
    rows = _rows(query, num_kv_heads)
    rows, keys32, values32 = (x.astype(jnp.float32) for x in (rows, keys, values))
    scores = jnp.einsum("bksh,bkqh->bksq", keys32, rows).swapaxes(2, 3) * jnp.float32(scale)
    if soft_cap is not None:
        scores = jnp.tanh(scores / jnp.float32(soft_cap)) * jnp.float32(soft_cap)
    scores = scores.reshape(batch, num_kv_heads, -1, num_tokens, num_slots)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    # XLA's CPU backend knows this softmax and fuses it; clamping its maximum costs a pass.
    weights = jax.nn.softmax(scores, axis=-1).reshape(batch, num_kv_heads, -1, num_slots)
    out = _tokens(jnp.einsum("bkqs,bksh->bkqh", weights, values32), num_tokens)
    lse = jax.nn.logsumexp(scores, axis=-1).reshape(batch, num_heads, num_tokens)
    return out.astype(values.dtype), lse


def _zero_unseen(
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B T S"],
    page_table: Int[Array, "B P"] | None,
) -> Float[Array, "B K S H"]:
    """Values that came from pages, with zeros in the slots that no query of their row sees."""
    if page_table is None:
        return values
    seen = jnp.any(visible, axis=1)[:, None, :, None]
    return jnp.where(seen, values, jnp.zeros((), values.dtype))


def _zero_where_blind(
    out: Float[Array, "B T N H"], sees: Bool[Array, "B T"]
) -> Float[Array, "B T N H"]:
    return jnp.where(sees[:, :, None, None], out, jnp.zeros((), out.dtype))


def _rows(x: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K M H"]:
    """What belongs to one kv head as rows: group by group, and in it token by token."""
    batch, num_tokens, num_heads, head_dim = x.shape
    x = x.reshape(batch, num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return x.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)


def _tokens(rows: Float[Array, "B K M H"], num_tokens: int) -> Float[Array, "B T N H"]:
    """The inverse of `_rows`."""
    batch, num_kv_heads, num_rows, head_dim = rows.shape
    rows = rows.reshape(batch, num_kv_heads, num_rows // num_tokens, num_tokens, head_dim)
    return rows.transpose(0, 3, 1, 2, 4).reshape(batch, num_tokens, -1, head_dim)


def _visible_to_prompt(
    num_tokens: int,
    key: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    causal: bool,
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which slots the tokens at positions start + t of a prompt see."""
    batch, num_slots = key.shape[:2]
    position = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]  # [T 1]
    position = position if start is None else start[:, None, None].astype(jnp.int32) + position
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    visible = jnp.ones((num_tokens, num_slots), bool)
    if causal:
        visible = visible & (slot <= position)
    if window is not None:
        visible = visible & (slot > position - window)
    if lengths is not None:
        visible = visible & (slot < lengths[:, None, None])
    return jnp.broadcast_to(visible, (batch, num_tokens, num_slots))


KERNELS = {
    "attention": Kernel(run=attention, unsupported=supports_everything),
    "attention_backward": Kernel(run=attention_backward, unsupported=supports_everything),
    "decode_attention": Kernel(run=decode_attention, unsupported=supports_everything),
    "verify_attention": Kernel(run=verify_attention, unsupported=supports_everything),
    "ancestor_attention": Kernel(run=ancestor_attention, unsupported=supports_everything),
    "tree_attention": Kernel(run=tree_attention, unsupported=supports_everything),
}
