# ruff: noqa: ANN001, ANN201  # arguments of Triton kernels are pointers; constants are annotated
"""Attention of few query rows over a long cache on GPUs without tensor memory or wgmma.

For sm_80, sm_86, sm_89 and sm_120, in Triton through jax-triton. The rows of a kv head (see
`decode_rows`) are cut into tiles of a matrix product; the keys into splits of a fixed number of
blocks, which `combine` merges. Blocks that all rows of a tile see completely skip the masks.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Array, Float, Int

from pallas_kernels.combine import combine
from pallas_kernels.decode_rows import kernels, not_one_16_bit_dtype
from pallas_kernels.exp2 import LOG2_E


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TritonConfig:
    """Rows and keys of a tile, key blocks of a split, and how Triton is to schedule it."""

    block_rows: int
    block_kv: int
    split_blocks: int
    num_warps: int = 4
    num_stages: int = 2


def triton_config(num_rows: int, num_slots: int) -> TritonConfig:
    """The configuration for some rows a kv head; never a matter of the batch."""
    block_rows = min(64, max(16, 1 << (num_rows - 1).bit_length()))
    block_kv = 64
    split_blocks = max(1, min(16, math.ceil(num_slots / block_kv / 16)))
    return TritonConfig(block_rows=block_rows, block_kv=block_kv, split_blocks=split_blocks)


def unsupported(query: Any, keys: Any, values: Any, page_table: Any = None) -> str | None:  # noqa: ANN401
    """Why the kernel cannot run with arrays of these shapes and dtypes, or None."""
    if (reason := not_one_16_bit_dtype(query, keys, values)) is not None:
        return reason
    if query.shape[-1] not in (64, 128):
        return f"takes head dims 64 and 128, got {query.shape[-1]}"
    if page_table is not None:
        return "takes no page tables"
    return None


@triton.jit
def attend_kernel(
    rows,
    keys,
    values,
    limits,
    low_bits,
    high_bits,
    num_visible,
    outs,
    lses,
    scale: tl.constexpr,  # times log2(e)
    num_rows: tl.constexpr,
    num_slots: tl.constexpr,
    num_kv_heads: tl.constexpr,
    num_splits: tl.constexpr,
    head_dim: tl.constexpr,
    has_bits: tl.constexpr,
    block_rows: tl.constexpr,
    block_kv: tl.constexpr,
    split_blocks: tl.constexpr,
):
    """One tile of rows of one kv head and one split of its keys: values [M H] and LSE [M]."""
    split, head = tl.program_id(1), tl.program_id(2)
    batch = head // num_kv_heads
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    exists = row < num_rows
    column = tl.arange(0, head_dim)
    rows += head * num_rows * head_dim
    query = tl.load(rows + row[:, None] * head_dim + column, mask=exists[:, None], other=0.0)
    row_limit = tl.load(limits + batch * num_rows + row, mask=exists, other=0)
    first_slot = split * split_blocks * block_kv
    visible = tl.minimum(tl.load(num_visible + batch), num_slots)
    last_slot = tl.minimum(first_slot + split_blocks * block_kv, visible)
    low = tl.load(low_bits + batch * num_rows + row, mask=exists, other=0)
    high = tl.load(high_bits + batch * num_rows + row, mask=exists, other=0)
    # Slots before the smallest limit of the rows that exist need no mask.
    smallest = tl.min(tl.where(exists, row_limit, num_slots))
    cache = head.to(tl.int64) * num_slots * head_dim
    keys += cache
    values += cache
    top = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    out = tl.zeros([block_rows, head_dim], tl.float32)
    for start in range(first_slot, last_slot, block_kv):
        slot = start + tl.arange(0, block_kv)
        inside = slot[:, None] < last_slot
        key = tl.load(keys + slot[:, None] * head_dim + column, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale
        if start + block_kv > smallest:
            distance = slot[None, :] - row_limit[:, None]
            seen = distance < 0
            if has_bits:
                word = tl.where(distance < 32, low[:, None], high[:, None])
                bit = (word >> (distance & 31)) & 1
                seen = seen | ((distance < 64) & (bit == 1))
            seen = seen & (slot[None, :] < last_slot)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * factor + tl.sum(weights, 1)
        value = tl.load(values + slot[:, None] * head_dim + column, mask=inside, other=0.0)
        out = tl.dot(weights.to(value.dtype), value, out * factor[:, None])
        top = new_top
    blind = total == 0  # and not NaN
    safe = tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), top + tl.log2(safe))
    part = (head * num_splits + split) * num_rows
    tl.store(lses + part + row, lse, mask=exists)
    target = outs + part.to(tl.int64) * head_dim + row[:, None] * head_dim + column
    tl.store(target, out / safe[:, None], mask=exists[:, None])


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
    """The attended rows, float32, and their LSE (base 2); see `decode_rows`."""
    del page_table  # refused above
    import jax_triton  # pyright: ignore[reportMissingImports]  # needs a GPU's JAX plugin

    batch, num_kv_heads, num_rows, _ = rows.shape
    config = triton_config(num_rows, keys.shape[2])
    constants, grid = launch(rows.shape, keys.shape[2], bits is not None, scale, config)
    limits, num_visible = limits.astype(jnp.int32), num_visible.astype(jnp.int32)
    low, high = (limits, limits) if bits is None else (bits[:, :, 0], bits[:, :, 1])
    leading = (batch, num_kv_heads, constants["num_splits"], num_rows)
    outs, lses = jax_triton.triton_call(
        rows,
        keys,
        values,
        limits,
        low,
        high,
        num_visible,
        kernel=attend_kernel,
        out_type=(
            jax.ShapeDtypeStruct((*leading, rows.shape[3]), jnp.float32),
            jax.ShapeDtypeStruct(leading, jnp.float32),
        ),
        grid=grid,
        backend_options=compiler_options(config),
        **constants,
    )
    return combine(outs, lses, jnp.ones(leading, bool))


def compiler_options(config: TritonConfig) -> dict[str, Any]:
    """What Triton's compiler is told; products and sums may be fused, as its default was."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def launch(
    rows_shape: tuple[int, ...],
    num_slots: int,
    has_bits: bool,
    scale: float,
    config: TritonConfig,
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The kernel's constants and its grid."""
    batch, num_kv_heads, num_rows, head_dim = rows_shape
    num_splits = math.ceil(num_slots / (config.block_kv * config.split_blocks))
    constants = {
        "scale": scale * LOG2_E,
        "num_rows": num_rows,
        "num_slots": num_slots,
        "num_kv_heads": num_kv_heads,
        "num_splits": num_splits,
        "head_dim": head_dim,
        "has_bits": has_bits,
        "block_rows": config.block_rows,
        "block_kv": config.block_kv,
        "split_blocks": config.split_blocks,
    }
    return constants, (math.ceil(num_rows / config.block_rows), num_splits, batch * num_kv_heads)


KERNELS = kernels(attend, unsupported)
