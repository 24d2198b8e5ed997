"""Attention of few query rows over a long cache on Blackwell (sm_100): decode, verify, trees.

`decode_splits` says how the work is cut up. Here a tile has the tensor core's 128 rows; scores and
weights share tensor memory. One warp copies, one issues products, a warpgroup per tile takes the
softmax and rescales the accumulator when a maximum grew.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.compat import (
    TMEM_LAYOUT,
    TMEM_ROW_LAYOUT,
    Ref,
    store,
    tiled_smem,
    wait_tmem_loads,
    wait_tmem_stores,
    warp_any,
)
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

TILE_ROWS = 128
_CHUNK = 32  # columns of scores or accumulators that a thread works on at once
_OUT_CHUNK = 16  # columns of the output that leave at once
_LOAD_WARP, _MULTIPLY_WARP = 0, 1
# With two tiles: the warpgroups of the softmax, and the one that loads and multiplies.
_SOFTMAX_REGISTERS, _, _OTHER_REGISTERS = register_budgets(208, 208, 88)


def _score_slots(shape: Shape) -> int:
    """Score buffers of a tile: with one tile alone, the next product runs during its softmax."""
    return 2 if shape.config.tiles == 1 else 1


def _build(shape: Shape, interpret: Any) -> Any:  # noqa: ANN401
    config, head_dim, dtype = shape.config, shape.head_dim, jnp.dtype(shape.dtype)
    tiles, slots = config.tiles, _score_slots(shape)
    interpreted = bool(interpret)

    def barriers(number: int, arrivals: int = 1, tensor: bool = False) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals, orders_tensor_core=tensor)

    stages = config.kv_stages
    scratch = {
        "rows_smem": [tiled_smem((TILE_ROWS, head_dim), dtype) for _ in range(tiles)],
        "keys_smem": tiled_smem((stages, BLOCK_KV, head_dim), dtype),
        "values_smem": tiled_smem((stages, BLOCK_KV, head_dim), dtype),
        "out_smem": tiled_f32((tiles, TILE_ROWS, _OUT_CHUNK)),
        "masks_smem": plgpu.SMEM((shape.num_masks, tiles * TILE_ROWS), jnp.int32),
        "lse_smem": plgpu.SMEM((tiles, TILE_ROWS), jnp.float32),
        # Weights lie on the scores they come from. One union a buffer: the race detector follows a
        # union as a whole.
        "scores": [
            plgpu.RefUnion(
                plgpu.TMEM((TILE_ROWS, BLOCK_KV), jnp.float32),
                plgpu.TMEM((TILE_ROWS, BLOCK_KV), dtype, packed=True),
            )
            for _ in range(tiles * slots)
        ],
        "outs": [plgpu.TMEM((TILE_ROWS, head_dim), jnp.float32) for _ in range(tiles)],
        "rows_ready": barriers(tiles),
        "masks_ready": barriers(1),
        "keys_ready": barriers(stages, shape.copies),
        "values_ready": barriers(stages, shape.copies),
        "keys_free": barriers(stages, tensor=True),
        "values_free": barriers(stages, tensor=True),
        "ragged_values_ready": barriers(1),
        "scores_ready": barriers(tiles * slots, tensor=True),
        "weights_ready": barriers(tiles * slots, tensor=True),
        "scores_free": barriers(tiles * slots, tensor=True),
        "out_ready": barriers(tiles, tensor=True),
    }

    def body(*refs: Ref, **scratch_refs: Ref) -> None:
        _block(shape, interpreted, refs, scratch_refs)

    return plgpu.kernel(
        body,
        out_type=out_types(shape),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        kernel_name="attention_decode_sm100",
        **grid(shape),
    )


def _block(shape: Shape, interpreted: bool, refs: tuple[Ref, ...], scratch: dict[str, Ref]) -> None:
    """What one block does: one split of one kv head of one batch row, and one group of tiles."""
    config = shape.config
    place, warpgroup = place_of(shape, refs[3]), lax.axis_index("warpgroup")

    @pl.when(place.first < place.last)
    def _() -> None:
        for tile in range(config.tiles):
            pl.when(warpgroup == tile)(
                functools.partial(_softmax, shape, interpreted, refs, scratch, place, tile)
            )

        @pl.when(warpgroup == config.tiles)
        def _() -> None:
            if config.tiles == 2:
                plgpu.set_max_registers(_OTHER_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp: Ref) -> None:
                pl.when(warp == _LOAD_WARP)(functools.partial(load, shape, refs, scratch, place))
                pl.when(warp == _MULTIPLY_WARP)(functools.partial(_multiply, shape, scratch, place))


def _multiply(shape: Shape, scratch: dict[str, Ref], place: Place) -> None:
    """Issue the tensor core's products: scores a step ahead of the weighted sums."""
    config = shape.config
    tiles, slots, stages = config.tiles, _score_slots(shape), config.kv_stages

    def scores(count: Ref) -> None:
        """The scores of one key block, for each tile, once their buffer is free."""
        stage = lax.rem(count, stages)
        plgpu.barrier_wait(scratch["keys_ready"].at[stage])
        for tile in range(tiles):
            _in_slot(slots, count, lambda slot, tile=tile: one_scores(count, stage, tile, slot))
        plgpu.tcgen05_commit_arrive(scratch["keys_free"].at[stage])

    def one_scores(count: Ref, stage: Ref, tile: int, slot: int) -> None:
        buffer = tile * slots + slot

        @pl.when(count >= slots)
        def _() -> None:
            plgpu.barrier_wait(scratch["scores_free"].at[buffer])

        plgpu.tcgen05_mma(
            scratch["scores"][buffer][0],
            scratch["rows_smem"][tile],
            scratch["keys_smem"].at[stage].T,
            accumulate=False,
        )
        plgpu.tcgen05_commit_arrive(scratch["scores_ready"].at[buffer])

    def sums(count: Ref) -> None:
        """The weighted sums of one block of values, for each tile, once its weights are there."""
        stage = lax.rem(count, stages)
        plgpu.barrier_wait(scratch["values_ready"].at[stage])

        @pl.when(is_ragged(place, place.first + count))
        def _() -> None:  # the first tile's weights come after its zeros
            plgpu.barrier_arrive(scratch["ragged_values_ready"].at[0])

        for tile in range(tiles):
            _in_slot(slots, count, lambda slot, tile=tile: one_sum(count, stage, tile, slot))
        plgpu.tcgen05_commit_arrive(scratch["values_free"].at[stage])

    def one_sum(count: Ref, stage: Ref, tile: int, slot: int) -> None:
        buffer = tile * slots + slot
        plgpu.barrier_wait(scratch["weights_ready"].at[buffer])
        plgpu.tcgen05_mma(
            scratch["outs"][tile],
            scratch["scores"][buffer][1],
            scratch["values_smem"].at[stage],
            accumulate=count > 0,
        )
        plgpu.tcgen05_commit_arrive(scratch["scores_free"].at[buffer])
        plgpu.tcgen05_commit_arrive(scratch["out_ready"].at[tile])

    num_blocks = place.last - place.first
    for tile in range(tiles):
        each_tile(
            shape,
            place,
            tile,
            lambda _, tile=tile: plgpu.barrier_wait(scratch["rows_ready"].at[tile]),
        )
    scores(jnp.int32(0))

    def step(count: Ref, carry: None) -> None:
        if slots > 1:  # the next scores go to the other buffer
            pl.when(count + 1 < num_blocks)(lambda: scores(count + 1))
            sums(count)
        else:
            sums(count)
            pl.when(count + 1 < num_blocks)(lambda: scores(count + 1))
        return carry

    lax.fori_loop(0, num_blocks, step, None)
    for buffer in range(tiles * slots):

        @pl.when(num_blocks > buffer % slots)
        def _(buffer: int = buffer) -> None:
            plgpu.barrier_wait(scratch["scores_free"].at[buffer])


def _in_slot(slots: int, count: Ref, act: Any) -> None:  # noqa: ANN401
    """`act(slot)` with the slot count % slots, static inside: unions cannot be indexed."""
    if slots == 1:
        act(0)
        return
    for slot in range(slots):
        pl.when(lax.rem(count, slots) == slot)(functools.partial(act, slot))


def _softmax(
    shape: Shape,
    interpreted: bool,
    refs: tuple[Ref, ...],
    scratch: dict[str, Ref],
    place: Place,
    tile: int,
) -> None:
    """Turn scores into weights, keep the running maximum and sum, and write the split's result."""
    if shape.config.tiles == 2:
        plgpu.set_max_registers(_SOFTMAX_REGISTERS, action="increase")
    slots = _score_slots(shape)
    log2_scale = jnp.float32(shape.scale * LOG2_E)
    out = scratch["outs"][tile]
    plgpu.barrier_wait(scratch["masks_ready"].at[0])
    masks = [
        plgpu.load(
            scratch["masks_smem"].at[i, pl.ds(tile * TILE_ROWS, TILE_ROWS)],
            layout=TMEM_ROW_LAYOUT,
            optimized=False,
        )
        for i in range(shape.num_masks)
    ]

    def step(masked: bool, block: Ref, carry: tuple[Ref, Ref]) -> tuple[Ref, Ref]:
        count = block - place.first
        if slots == 1:
            return one(masked, block, 0, *carry)
        return lax.cond(
            lax.rem(count, slots) == 0,
            functools.partial(one, masked, block, 0),
            functools.partial(one, masked, block, 1),
            *carry,
        )

    def one(masked: bool, block: Ref, slot: int, top: Ref, total: Ref) -> tuple[Array, Array]:
        buffer = tile * slots + slot
        scores_ref, weights_ref = scratch["scores"][buffer]
        plgpu.barrier_wait(scratch["scores_ready"].at[buffer])
        chunks = []
        for start in range(0, BLOCK_KV, _CHUNK):
            chunk = plgpu.async_load_tmem(
                scores_ref.at[:, pl.ds(start, _CHUNK)], layout=TMEM_LAYOUT
            )
            chunks.append(
                mask_scores(chunk, masks, block * BLOCK_KV + start, TMEM_LAYOUT)
                if masked
                else chunk
            )
        new_top = top
        for chunk in chunks:
            new_top = jnp.maximum(new_top, jnp.max(chunk, axis=1))
        # A row that has seen nothing yet keeps a top of minus infinity, and weights of zero.
        base = jnp.where(new_top == -jnp.inf, jnp.float32(0), new_top) * log2_scale
        factor = jnp.exp2(jnp.where(top == -jnp.inf, -jnp.inf, top * log2_scale - base))
        plgpu.wait_load_tmem()
        total = total * factor
        for i, chunk in enumerate(chunks):
            weights = jnp.exp2(chunk * log2_scale - columns(base, _CHUNK))
            total = total + jnp.sum(weights, axis=1)
            plgpu.async_store_tmem(
                weights_ref.at[:, pl.ds(i * _CHUNK, _CHUNK)], weights.astype(weights_ref.dtype)
            )
        plgpu.commit_tmem()

        @pl.when(block > place.first)
        def _() -> None:
            plgpu.barrier_wait(scratch["out_ready"].at[tile])

            @pl.when(warp_any(new_top > top, interpret=interpreted))
            def _() -> None:
                for start in range(0, shape.head_dim, _CHUNK):
                    part = out.at[:, pl.ds(start, _CHUNK)]
                    old = plgpu.async_load_tmem(part, layout=TMEM_LAYOUT)
                    wait_tmem_loads(interpret=interpreted)
                    plgpu.async_store_tmem(part, old * columns(factor, _CHUNK))
                wait_tmem_stores(interpret=interpreted)

        if masked and tile == 0:

            @pl.when(is_ragged(place, block))
            def _() -> None:
                plgpu.barrier_wait(scratch["ragged_values_ready"].at[0])
                stage = lax.rem(block - place.first, shape.config.kv_stages)
                zero_unseen(scratch["values_smem"].at[stage], place, block)

        plgpu.barrier_arrive(scratch["weights_ready"].at[buffer])
        return new_top, total

    nothing = plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), TMEM_ROW_LAYOUT)
    zero = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), TMEM_ROW_LAYOUT)
    carry = (nothing, zero)
    carry = lax.fori_loop(place.first, place.unmasked, functools.partial(step, False), carry)
    top, total = lax.fori_loop(place.unmasked, place.last, functools.partial(step, True), carry)
    plgpu.barrier_wait(scratch["out_ready"].at[tile])
    blind = total == 0  # and not NaN
    safe = jnp.where(blind, jnp.float32(1), total)
    lse = top * log2_scale + jnp.log2(safe)
    inverse = 1 / safe
    lse_smem, out_smem = scratch["lse_smem"].at[tile], scratch["out_smem"].at[tile]
    store(lse_smem, jnp.where(blind, -jnp.inf, lse))
    start_row = (place.group * shape.config.tiles + tile) * TILE_ROWS
    out_gmem, lse_gmem = refs[-2:]
    where = (place.row, place.head, place.split)
    for start in range(0, shape.head_dim, _OUT_CHUNK):
        part = plgpu.async_load_tmem(out.at[:, pl.ds(start, _OUT_CHUNK)], layout=TMEM_LAYOUT)
        if start:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = part * columns(inverse, _OUT_CHUNK)
        plgpu.commit_smem()

        def write(count: int, start: int = start) -> None:
            rows = pl.ds(start_row, count)
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(0, count)], out_gmem.at[*where, rows, pl.ds(start, _OUT_CHUNK)]
            )
            if start == 0:
                plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, count)], lse_gmem.at[*where, rows])

        each_tile(shape, place, tile, write)
    plgpu.wait_load_tmem()
    plgpu.wait_smem_to_gmem(0)


attend = functools.partial(attend_splits, _build, TILE_ROWS)
KERNELS = kernels(attend, unsupported)
