"""Attention of few query rows over a long cache on Hopper (sm_90): decode, verify, trees.

`decode_splits` says how the work is cut up. Here a tile has the 64 rows of a warpgroup's product.
Its warpgroup multiplies, takes the softmax and adds up in registers; nothing overlaps inside it,
since a block of keys takes longer to arrive than to compute. Weights go through shared memory, so
that the interpreter, which knows no left operand in registers, runs the kernel as it is.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import Ref, store, tiled_smem
from pallas_kernels.decode_rows import kernels
from pallas_kernels.decode_splits import (
    BLOCK_KV,
    Place,
    Shape,
    attend_splits,
    columns,
    each_tile,
    grid,
    is_ragged,
    load,
    mask_scores,
    out_types,
    place_of,
    tiled_f32,
    unsupported,
    zero_unseen,
)
from pallas_kernels.exp2 import LOG2_E
from pallas_kernels.register_budgets import register_budgets

TILE_ROWS = 64
_OUT_COLUMNS = 32  # columns of the output that leave at once
_LAYOUT = plgpu.Layout.WGMMA
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
# With two tiles: their warpgroups, and the one that loads.
_TILE_REGISTERS, _, _LOAD_REGISTERS = register_budgets(232, 232, 40)


def _build(shape: Shape, interpret: Any) -> Any:  # noqa: ANN401
    config, head_dim, dtype = shape.config, shape.head_dim, jnp.dtype(shape.dtype)
    tiles, stages = config.tiles, config.kv_stages

    def barriers(number: int, arrivals: int = 1) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)

    scratch = {
        "rows_smem": [tiled_smem((TILE_ROWS, head_dim), dtype) for _ in range(tiles)],
        "weights_smem": [tiled_smem((TILE_ROWS, BLOCK_KV), dtype) for _ in range(tiles)],
        "keys_smem": tiled_smem((stages, BLOCK_KV, head_dim), dtype),
        "values_smem": tiled_smem((stages, BLOCK_KV, head_dim), dtype),
        "out_smem": [tiled_f32((TILE_ROWS, _OUT_COLUMNS)) for _ in range(tiles)],
        "masks_smem": plgpu.SMEM((shape.num_masks, tiles * TILE_ROWS), jnp.int32),
        "lse_smem": plgpu.SMEM((tiles, TILE_ROWS), jnp.float32),
        "rows_ready": barriers(tiles),
        "masks_ready": barriers(1),
        "keys_ready": barriers(stages, shape.copies),
        "values_ready": barriers(stages, shape.copies),
        "keys_free": barriers(stages, tiles),
        "values_free": barriers(stages, tiles),
        "values_zeroed": barriers(1),
    }

    def body(*refs: Ref, **scratch_refs: Ref) -> None:
        _block(shape, refs, scratch_refs)

    return plgpu.kernel(
        body,
        out_type=out_types(shape),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        kernel_name="attention_decode_sm90",
        **grid(shape),
    )


def _block(shape: Shape, refs: tuple[Ref, ...], scratch: dict[str, Ref]) -> None:
    """What one block does: one split of one kv head of one batch row, and one group of tiles."""
    tiles = shape.config.tiles
    place, warpgroup = place_of(shape, refs[3]), lax.axis_index("warpgroup")

    @pl.when(place.first < place.last)
    def _() -> None:
        for tile in range(tiles):
            pl.when(warpgroup == tile)(
                functools.partial(_attend_tile, shape, refs, scratch, place, tile)
            )

        @pl.when(warpgroup == tiles)
        def _() -> None:
            if tiles == 2:
                plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp: Ref) -> None:
                pl.when(warp == 0)(functools.partial(load, shape, refs, scratch, place))


def _attend_tile(
    shape: Shape, refs: tuple[Ref, ...], scratch: dict[str, Ref], place: Place, tile: int
) -> None:
    """One tile of rows over all key blocks of the split, and the split's result."""
    if shape.config.tiles == 2:
        plgpu.set_max_registers(_TILE_REGISTERS, action="increase")
    stages, head_dim = shape.config.kv_stages, shape.head_dim
    log2_scale = jnp.float32(shape.scale * LOG2_E)
    rows, weights_smem = scratch["rows_smem"][tile], scratch["weights_smem"][tile]
    plgpu.barrier_wait(scratch["masks_ready"].at[0])
    masks = [
        plgpu.load(
            scratch["masks_smem"].at[i, pl.ds(tile * TILE_ROWS, TILE_ROWS)],
            layout=_ROW_LAYOUT,
            optimized=False,
        )
        for i in range(shape.num_masks)
    ]
    each_tile(shape, place, tile, lambda count: plgpu.barrier_wait(scratch["rows_ready"].at[tile]))

    def product(width: int, left: Ref, right: Ref) -> Ref:
        def multiply(accumulator: Ref) -> Ref:
            plgpu.wgmma(accumulator, left, right)
            return plgpu.wgmma_accumulator_load(accumulator, wait_n=0)

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE_ROWS, width), jnp.float32))

    def zero(values: Ref, block: Ref) -> None:
        """The first tile's warpgroup does it for all that multiply with these values."""
        if tile == 0:
            zero_unseen(values, place, block)
        if shape.config.tiles == 2:
            meet = plgpu.barrier_arrive if tile == 0 else plgpu.barrier_wait
            meet(scratch["values_zeroed"].at[0])

    def step(masked: bool, block: Ref, carry: tuple[Ref, Ref, Ref]) -> tuple[Ref, Ref, Ref]:
        out, top, total = carry
        slot = lax.rem(block - place.first, stages)
        plgpu.barrier_wait(scratch["keys_ready"].at[slot])
        keys = scratch["keys_smem"].at[slot].transpose((1, 0))
        scores = product(BLOCK_KV, rows, keys)
        plgpu.barrier_arrive(scratch["keys_free"].at[slot])
        if masked:
            scores = mask_scores(scores, masks, block * BLOCK_KV, _LAYOUT)
        new_top = jnp.maximum(top, scores.max(axis=1) * log2_scale)
        # A row that has seen nothing yet keeps a top of minus infinity, and weights of zero.
        base = jnp.where(new_top == -jnp.inf, jnp.float32(0), new_top)
        factor = jnp.exp2(top - base)
        weights = jnp.exp2(scores * log2_scale - columns(base, BLOCK_KV))
        total = total * factor + weights.sum(axis=1)
        weights_smem[...] = weights.astype(weights_smem.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(scratch["values_ready"].at[slot])
        values = scratch["values_smem"].at[slot]
        if masked:
            pl.when(is_ragged(place, block))(functools.partial(zero, values, block))
        added = product(head_dim, weights_smem, values)
        plgpu.barrier_arrive(scratch["values_free"].at[slot])
        return out * columns(factor, head_dim) + added, new_top, total

    out = plgpu.layout_cast(jnp.zeros((TILE_ROWS, head_dim), jnp.float32), _LAYOUT)
    top = plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), _ROW_LAYOUT)
    total = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), _ROW_LAYOUT)
    carry = (out, top, total)
    carry = lax.fori_loop(place.first, place.unmasked, functools.partial(step, False), carry)
    carry = lax.fori_loop(place.unmasked, place.last, functools.partial(step, True), carry)
    out, top, total = carry
    blind = total == 0  # and not NaN
    safe = jnp.where(blind, jnp.float32(1), total)
    lse_smem, out_smem = scratch["lse_smem"].at[tile], scratch["out_smem"][tile]
    store(lse_smem, jnp.where(blind, -jnp.inf, top + jnp.log2(safe)))
    out = out * columns(1 / safe, head_dim)
    start_row = (place.group * shape.config.tiles + tile) * TILE_ROWS
    out_gmem, lse_gmem = refs[-2:]
    where = (place.row, place.head, place.split)
    for start in range(0, head_dim, _OUT_COLUMNS):
        if start:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = out[:, start : start + _OUT_COLUMNS]
        plgpu.commit_smem()

        def write(count: int, start: int = start) -> None:
            there = pl.ds(start_row, count)
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(0, count)], out_gmem.at[*where, there, pl.ds(start, _OUT_COLUMNS)]
            )
            if start == 0:
                plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, count)], lse_gmem.at[*where, there])

        each_tile(shape, place, tile, write)
    plgpu.wait_smem_to_gmem(0)


attend = functools.partial(attend_splits, _build, TILE_ROWS)
KERNELS = kernels(attend, unsupported)
