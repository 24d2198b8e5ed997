"""Decode, verify and tree attention over 16-bit caches for a CPU: XLA, block by block of slots.

XLA's CPU backend converts a whole 16-bit cache to float32 before it multiplies with it, empty slots
and all. Here a block is converted at a time, and only blocks that some row sees. Caches in float32
are multiplied in place by the reference, which is faster for full ones (bench/KERNELS.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_rows import kernels, not_one_16_bit_dtype
from pallas_kernels.exp2 import LOG2_E

_BLOCK = 128  # slots


def unsupported(query: Any, keys: Any, values: Any, page_table: Any) -> str | None:  # noqa: ANN401
    """Why this form is not for arrays of these shapes and dtypes, or None."""
    if (reason := not_one_16_bit_dtype(query, keys, values)) is not None:
        return reason
    if keys.shape[2] % _BLOCK:
        return f"takes caches of a multiple of {_BLOCK} slots, got {keys.shape[2]}"
    return None if page_table is None else "takes no page tables"


def attend(
    rows: Float[Array, "B K M H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    limits: Int[Array, "B M"],
    bits: Int[Array, "B M 2"] | None,
    num_visible: Int[Array, "B"],
    page_table: None,
    *,
    scale: float,
) -> tuple[Float[Array, "B K M H"], Float[Array, "B K M"]]:
    """The attended rows, float32, and their LSE (base 2); see `decode_rows`.

    Source: the online softmax of FlashAttention-2 (Dao 2023), algorithm 1.
    """
    del page_table  # refused above
    rows = rows.astype(jnp.float32) * jnp.float32(scale * LOG2_E)
    shape = rows.shape[:3]

    def add(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = carry
        first = block * _BLOCK
        key, value = (
            jax.lax.dynamic_slice_in_dim(x, first, _BLOCK, axis=2).astype(jnp.float32)
            for x in (keys, values)
        )
        scores = jnp.einsum("bksh,bkmh->bkms", key, rows)
        slot = first + jnp.arange(_BLOCK, dtype=jnp.int32)
        seen = _seen(slot, limits, bits)
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        # Nothing is written where no row sees: 0 times NaN is NaN.
        value = jnp.where((slot < num_visible[:, None])[:, None, :, None], value, jnp.float32(0))
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        base = jnp.where(new_top == -jnp.inf, jnp.float32(0), new_top)
        weights, shrink = jnp.exp2(scores - base[..., None]), jnp.exp2(top - base)
        out = out * shrink[..., None] + jnp.einsum("bkms,bksh->bkmh", weights, value)
        return out, new_top, total * shrink + jnp.sum(weights, axis=-1)

    nothing = (
        jnp.zeros((*shape, values.shape[3]), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    num_blocks = (jnp.max(num_visible).astype(jnp.int32) + _BLOCK - 1) // _BLOCK
    out, top, total = jax.lax.fori_loop(0, num_blocks, add, nothing)
    blind = total == 0  # and not NaN
    safe = jnp.where(blind, jnp.float32(1), total)
    return out / safe[..., None], jnp.where(blind, -jnp.inf, top + jnp.log2(safe))


def _seen(
    slot: Int[Array, "C"], limits: Int[Array, "B M"], bits: Int[Array, "B M 2"] | None
) -> Array:
    distance = slot - limits[..., None].astype(jnp.int32)  # [B M C]
    if bits is None:
        return distance < 0
    word = jnp.where(distance < 32, bits[..., :1], bits[..., 1:])
    bit = jax.lax.shift_right_logical(word, distance & 31) & 1
    return (distance < 0) | (distance < 64) & (bit == 1)


KERNELS = kernels(attend, unsupported)
