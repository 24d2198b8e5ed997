"""The ops on caches as one problem: rows of queries, each with a limit and 64 bits.

A kernel that solves that problem implements decode, verify, ancestor and tree attention at once.
The rows of a kv head are its query heads of every token, token by token. A row sees the slots
before its limit, and slot limit + i if bit i of its 64 bits is set.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.combine import combine
from pallas_kernels.exp2 import LOG2_E
from pallas_kernels.registry import Kernel

_MOST_ROWS = 1024  # a prompt's chunk has more; that is a job for a prefill kernel


def kernels(
    attend: Callable[..., tuple[Array, Array]],
    unsupported: Callable[[Any, Any, Any, Any], str | None],
) -> dict[str, Kernel]:
    """The four ops by way of `attend`, unless `unsupported` gives a reason.

    `attend(rows [B K M H], keys [B K S H], values [B K S H], limits [B M], bits [B M 2] or None,
    num_visible [B], page_table [B P] or None, scale=)` returns the attended rows [B K M H] and
    their LSE (base 2) [B K M], float32. Bits are int32, the low word first; no row of b sees a slot
    from num_visible[b] on. `unsupported` takes query, keys, values and page table.
    """

    def decode(
        query: Float[Array, "B N H"],
        keys: Float[Array, "X K Z H"],
        values: Float[Array, "X K Z H"],
        lengths: Int[Array, "B"],
        *,
        scale: float,
        page_table: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B N H"]:
        out = ancestors_of_nobody(query[:, None], keys, values, lengths[:, None], scale, page_table)
        return out[:, 0]

    def verify(
        query: Float[Array, "B T N H"],
        keys: Float[Array, "X K Z H"],
        values: Float[Array, "X K Z H"],
        start: Int[Array, "B"],
        *,
        scale: float,
        page_table: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B T N H"]:
        seen = start[:, None] + jnp.arange(1, query.shape[1] + 1, dtype=start.dtype)
        return ancestors_of_nobody(query, keys, values, seen, scale, page_table)

    def ancestors_of_nobody(
        query: Float[Array, "B T N H"],
        keys: Float[Array, "X K Z H"],
        values: Float[Array, "X K Z H"],
        seen: Int[Array, "B T"],
        scale: float,
        page_table: Int[Array, "B P"] | None,
    ) -> Float[Array, "B T N H"]:
        num_kv_heads = keys.shape[1]
        rows = rows_of(query, num_kv_heads)
        limits = jnp.repeat(seen, query.shape[2] // num_kv_heads, axis=1)
        out, _ = attend(
            rows,
            keys,
            values,
            limits,
            None,
            jnp.max(seen, axis=1),
            page_table=page_table,
            scale=scale,
        )
        return tokens_of(out, query.shape[1]).astype(values.dtype)

    def ancestor(
        query: Float[Array, "B T N H"],
        keys: Float[Array, "X K Z H"],
        values: Float[Array, "X K Z H"],
        prefix: Int[Array, "B"],
        ancestors: UInt32[Array, "B T 2"],
        *,
        scale: float,
        page_table: Int[Array, "B P"] | None = None,
    ) -> Float[Array, "B T N H"]:
        num_kv_heads, num_slots = keys.shape[1], num_slots_of(keys, page_table)
        group = query.shape[2] // num_kv_heads
        rows = rows_of(query, num_kv_heads)
        limits = jnp.broadcast_to(prefix[:, None], rows.shape[::2])
        bits = jnp.repeat(jax.lax.bitcast_convert_type(ancestors, jnp.int32), group, axis=1)
        num_visible = jnp.minimum(prefix + _num_nodes(ancestors).astype(prefix.dtype), num_slots)
        out, _ = attend(
            rows, keys, values, limits, bits, num_visible, page_table=page_table, scale=scale
        )
        return tokens_of(out, query.shape[1]).astype(values.dtype)

    def tree(
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
        num_kv_heads = trunk_keys.shape[1]
        rows = rows_of(query, num_kv_heads)
        limits = jnp.repeat(trunk_lengths, query.shape[2] // num_kv_heads, axis=1)
        num_visible = jnp.max(trunk_lengths, axis=1)
        trunk = attend(
            rows,
            trunk_keys,
            trunk_values,
            limits,
            None,
            num_visible,
            page_table=page_table,
            scale=scale,
        )
        own = _own_keys(rows, branch_keys, branch_values, step, scale)
        outs, lses = (jnp.stack(parts, axis=2) for parts in zip(trunk, own, strict=True))
        out, _ = combine(outs, lses, jnp.ones(lses.shape, bool))
        return tokens_of(out, query.shape[1]).astype(trunk_values.dtype)

    def refusal(
        query: Any,  # noqa: ANN401
        keys: Any,  # noqa: ANN401
        values: Any,  # noqa: ANN401
        *others: Any,  # noqa: ANN401
        scale: float,
        page_table: Any = None,  # noqa: ANN401
    ) -> str | None:
        del others, scale
        num_rows = query.size // (query.shape[0] * keys.shape[1] * query.shape[-1])
        if num_rows > _MOST_ROWS:
            return f"takes up to {_MOST_ROWS} query rows a kv head, got {num_rows}"
        return unsupported(query, keys, values, page_table)

    return {
        "decode_attention": Kernel(run=decode, unsupported=refusal),
        "verify_attention": Kernel(run=verify, unsupported=refusal),
        "ancestor_attention": Kernel(run=ancestor, unsupported=refusal),
        "tree_attention": Kernel(run=tree, unsupported=refusal),
    }


def not_one_16_bit_dtype(*arrays: Any) -> str | None:  # noqa: ANN401
    """Why a kernel for 16-bit caches cannot take these arrays, or None."""
    dtypes = {jnp.dtype(x.dtype).name for x in arrays}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"takes bfloat16 or float16, the same for all, got {', '.join(sorted(dtypes))}"
    return None


def num_slots_of(keys: Any, page_table: Any) -> int:  # noqa: ANN401
    """Slots of a row of a cache [B K S H], or of one in pages [X K Z H] with a table [B P]."""
    return keys.shape[2] * (1 if page_table is None else page_table.shape[1])


def rows_of(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K M H"]:
    """The query as rows of each kv head, token by token."""
    batch, num_tokens, num_heads, head_dim = query.shape
    query = query.reshape(batch, num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return query.swapaxes(1, 2).reshape(batch, num_kv_heads, -1, head_dim)


def tokens_of(rows: Float[Array, "B K M H"], num_tokens: int) -> Float[Array, "B T N H"]:
    """The inverse of `rows_of`."""
    batch, num_kv_heads, num_rows, head_dim = rows.shape
    rows = rows.reshape(batch, num_kv_heads, num_tokens, num_rows // num_tokens, head_dim)
    return rows.swapaxes(1, 2).reshape(batch, num_tokens, -1, head_dim)


def _num_nodes(ancestors: UInt32[Array, "B T 2"]) -> Int[Array, "B"]:
    """How many nodes of each row's tree there are up to the last that any token sees."""
    length = 32 - jax.lax.clz(ancestors).astype(jnp.int32)  # of each word up to its highest bit
    low, high = length[:, :, 0], length[:, :, 1]
    return jnp.max(jnp.where(high > 0, 32 + high, low), axis=1)


def _own_keys(
    rows: Float[Array, "B K M H"],
    keys: Float[Array, "B K J R H"],
    values: Float[Array, "B K J R H"],
    step: Int[Array, ""],
    scale: float,
) -> tuple[Float[Array, "B K M H"], Float[Array, "B K M"]]:
    """Attention of each branch's rows to the branch's own keys of steps 0 .. step, and the LSE.

    They are few: products and sums that XLA fuses, not matrix products.
    """
    batch, num_kv_heads, num_rows, head_dim = rows.shape
    num_branches = keys.shape[3]
    shape = (batch, num_kv_heads, num_branches, num_rows // num_branches, head_dim)
    query = rows.reshape(shape).astype(jnp.float32)[:, :, :, :, None]  # [B K R G 1 H]
    keys, values = (
        x.astype(jnp.float32).swapaxes(2, 3)[:, :, :, None] for x in (keys, values)
    )  # [B K R 1 J H]
    scores = jnp.sum(query * keys, axis=-1) * jnp.float32(scale)
    written = jnp.arange(scores.shape[-1], dtype=step.dtype) <= step
    scores = jnp.where(written, scores, -jnp.inf)
    values = jnp.where(written[:, None], values, jnp.float32(0))  # what they hold may be NaN
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    out = jnp.sum(jnp.exp(scores - lse)[..., None] * values, axis=-2)
    flat = (batch, num_kv_heads, num_rows)
    return out.reshape(*flat, head_dim), lse.reshape(flat) * jnp.float32(LOG2_E)
