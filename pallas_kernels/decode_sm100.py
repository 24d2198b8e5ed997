"""Attention of few query rows over a long cache on Blackwell (sm_100): decode, verify, trees.

All query heads and tokens of one kv head are rows of one matrix, so that keys and values are read
once for all of them. Rows come in tiles of 128, the tensor core's; a block works on one or two
tiles and on a run of key blocks (a split). It has one warpgroup per tile for the softmax and one
whose first warps copy (keys, values) and multiply.

What a row sees is a limit (all slots before it) and 64 bits (slots limit .. limit + 63). Key blocks
that all rows see completely, which are all but the last few, take a loop without masks.

Each split's result is normalised and comes with its LSE (base 2); `combine.py` merges them. A
row's result never depends on the batch it is in: splits are runs of a fixed number of blocks.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.combine import LOG2_E, combine
from pallas_kernels.compat import (
    TMEM_LAYOUT,
    TMEM_ROW_LAYOUT,
    store,
    unsupported_jax,
    warp_any,
)
from pallas_kernels.decode_rows import kernels

TILE_ROWS = 128
BLOCK_KV = 128
_ROWS_STEP = 8  # rows that are copied in and out: a multiple of the memory tiling
_CHUNK = 32  # columns of scores or accumulators that a thread works on at once
_OUT_CHUNK = 16  # columns of the output that leave at once
_LOAD_WARP, _MULTIPLY_WARP = 0, 1
# Registers a thread has with two tiles, of 512 for a thread of each warpgroup: softmax, others.
_SOFTMAX_REGISTERS, _OTHER_REGISTERS = 208, 96


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Shape of the kernel.

    tiles: row tiles a block works on, each with its own warpgroup.
    kv_stages: blocks of keys, and of values, that shared memory holds.
    split_blocks: key blocks a split works on.
    """

    tiles: int = 1
    kv_stages: int = 2
    split_blocks: int = 8

    def __post_init__(self) -> None:
        """Refuse what no kernel can be built for.

        Raises:
            ValueError: A field is out of its range.
        """
        if self.tiles not in (1, 2):
            raise ValueError(f"tiles must be 1 or 2, got {self.tiles}.")
        for name in ("kv_stages", "split_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def score_slots(self) -> int:
        """Score buffers a tile has: with a tile alone the next product runs during its softmax."""
        return 2 if self.tiles == 1 else 1


def decode_config(num_rows: int, head_dim: int, num_blocks: int) -> DecodeConfig:
    """The configuration for some rows a kv head and a cache of `num_blocks` key blocks."""
    return DecodeConfig(
        tiles=1 if num_rows <= TILE_ROWS else 2,
        kv_stages=2 if head_dim > 64 else 4,
        split_blocks=max(1, min(8, math.ceil(num_blocks / 16))),
    )


def unsupported(query: Any, keys: Any, values: Any) -> str | None:  # noqa: ANN401
    """Why the kernel cannot run with arrays of these shapes and dtypes, or None."""
    dtypes = {jnp.dtype(x.dtype).name for x in (query, keys, values)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"takes bfloat16 or float16, the same for all, got {', '.join(sorted(dtypes))}"
    if query.shape[-1] not in (64, 128):
        return f"takes head dims 64 and 128, got {query.shape[-1]}"
    if keys.shape[2] % BLOCK_KV:
        return f"takes caches of a multiple of {BLOCK_KV} slots, got {keys.shape[2]}"
    return unsupported_jax()


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def attend(
    rows: Float[Array, "B K M H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    limits: Int[Array, "B M"],
    bits: Int[Array, "B M 2"] | None,
    num_visible: Int[Array, "B"],
    page_table: Int[Array, "B P"] | None = None,
    *,
    scale: float,
    config: DecodeConfig | None = None,
    interpret: Any = False,  # noqa: ANN401
) -> tuple[Float[Array, "B K M H"], Float[Array, "B K M"]]:
    """The attended rows, float32, and their LSE (base 2); see `decode_rows` and `attend_splits`."""
    if config is None:
        num_slots = keys.shape[2] if page_table is None else keys.shape[2] * page_table.shape[1]
        config = decode_config(rows.shape[2], rows.shape[3], num_slots // BLOCK_KV)
    arrays = (rows, keys, values, limits, bits, num_visible, page_table)
    outs, lses = attend_splits(*arrays, scale=scale, config=config, interpret=interpret)
    first_slot = jnp.arange(outs.shape[2], dtype=jnp.int32) * config.split_blocks * BLOCK_KV
    computed = first_slot < num_visible[:, None]
    return combine(outs, lses, jnp.broadcast_to(computed[:, None, :, None], lses.shape))


def attend_splits(
    rows: Float[Array, "B K M H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    limits: Int[Array, "B M"],
    bits: Int[Array, "B M 2"] | None,
    num_visible: Int[Array, "B"],
    page_table: Int[Array, "B P"] | None,
    *,
    scale: float,
    config: DecodeConfig,
    interpret: Any = False,  # noqa: ANN401
) -> tuple[Float[Array, "B K C M H"], Float[Array, "B K C M"]]:
    """For each of C splits the attended values (float32) and their LSE (base 2).

    Row m of batch row b sees the slots before limits[b, m] and slot limits[b, m] + i if bit i of
    bits[b, m] is set (the low word first). No row of b sees slots from num_visible[b] on: splits
    past them are not computed and hold anything. Without a page table keys and values are
    [B K S H]; with one they are a pool of pages of Z slots, and slot s of b lies in page
    page_table[b, s // Z].
    """
    batch, num_kv_heads, num_rows, head_dim = rows.shape
    page_slots = keys.shape[2]
    num_slots = page_slots if page_table is None else page_slots * page_table.shape[1]
    num_splits = pl.cdiv(num_slots // BLOCK_KV, config.split_blocks)
    used = pl.cdiv(num_rows, _ROWS_STEP) * _ROWS_STEP
    groups = pl.cdiv(used, config.tiles * TILE_ROWS)
    padded = groups * config.tiles * TILE_ROWS
    rows = _pad_axis(rows, 2, used)
    limits = limits.astype(jnp.int32)
    first_limit = jnp.min(limits, axis=1)
    # Per batch row: key blocks that any row sees, and how many of them all rows see completely.
    blocks = jnp.stack([pl.cdiv(num_visible, BLOCK_KV), first_limit // BLOCK_KV], axis=1)
    blocks = blocks.astype(jnp.int32)
    masks = [limits] if bits is None else [limits, bits[:, :, 0], bits[:, :, 1]]
    masks = _pad_axis(jnp.stack(masks, axis=1).astype(jnp.int32), 2, padded)
    kernel = _build(
        _Shape(
            batch=batch,
            num_kv_heads=num_kv_heads,
            used_rows=used,
            row_groups=groups,
            num_splits=num_splits,
            head_dim=head_dim,
            num_masks=masks.shape[1],
            page_slots=0 if page_table is None else page_slots,
            dtype=jnp.dtype(rows.dtype).name,
            scale=scale,
            config=config,
        ),
        interpret,
    )
    table = () if page_table is None else (page_table.astype(jnp.int32),)
    out, lse = kernel(rows, keys, values, masks, blocks, *table)
    return out[..., :num_rows, :], lse[..., :num_rows]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Everything the kernel is specialised for; `page_slots` is 0 for a dense cache."""

    batch: int
    num_kv_heads: int
    used_rows: int
    row_groups: int
    num_splits: int
    head_dim: int
    num_masks: int
    page_slots: int
    dtype: str
    scale: float
    config: DecodeConfig

    @property
    def copies(self) -> int:
        """Bulk copies that bring one block of keys."""
        return BLOCK_KV // self.page_slots if 0 < self.page_slots < BLOCK_KV else 1

    def rows_of(self, group: int, tile: int) -> int:
        """Rows of a tile that exist; they are copied in and out."""
        before = (group * self.config.tiles + tile) * TILE_ROWS
        return min(TILE_ROWS, self.used_rows - before)


def _build(shape: _Shape, interpret: Any) -> Any:  # noqa: ANN401
    config, head_dim, dtype = shape.config, shape.head_dim, jnp.dtype(shape.dtype)
    tiles, slots = config.tiles, config.score_slots
    interpreted = bool(interpret)

    def barriers(number: int, arrivals: int = 1, tensor: bool = False) -> plgpu.Barrier:
        return plgpu.Barrier(num_barriers=number, num_arrivals=arrivals, orders_tensor_core=tensor)

    def tiled(shape_: tuple[int, ...], dtype_: Any) -> Any:  # noqa: ANN401
        width = min(128, shape_[-1] * jnp.dtype(dtype_).itemsize)
        columns = width // jnp.dtype(dtype_).itemsize
        tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
        swizzle = plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape_, dtype_, transforms=(tiling, swizzle))

    stages = config.kv_stages
    scratch = {
        "rows_smem": tiled((tiles, TILE_ROWS, head_dim), dtype),
        "keys_smem": tiled((stages, BLOCK_KV, head_dim), dtype),
        "values_smem": tiled((stages, BLOCK_KV, head_dim), dtype),
        "out_smem": tiled((tiles, TILE_ROWS, _OUT_CHUNK), jnp.float32),
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
        "scores_ready": barriers(tiles * slots, tensor=True),
        "weights_ready": barriers(tiles * slots, tensor=True),
        "scores_free": barriers(tiles * slots, tensor=True),
        "out_ready": barriers(tiles, tensor=True),
    }

    def body(*refs: Any, **scratch_refs: Any) -> None:  # noqa: ANN401
        _block(shape, interpreted, refs, scratch_refs)

    grid = (shape.num_splits, shape.row_groups, shape.batch * shape.num_kv_heads)
    leading = (shape.batch, shape.num_kv_heads, shape.num_splits, shape.used_rows)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*leading, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(leading, jnp.float32),
        ),
        grid=grid,
        grid_names=("split", "group", "head"),
        num_threads=tiles + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )


def _block(shape: _Shape, interpreted: bool, refs: Any, scratch: dict[str, Any]) -> None:  # noqa: ANN401
    """What one block does: one split of one kv head of one batch row, and one group of tiles."""
    config = shape.config
    split, group = lax.axis_index("split"), lax.axis_index("group")
    index = lax.axis_index("head")
    row, head = lax.div(index, shape.num_kv_heads), lax.rem(index, shape.num_kv_heads)
    blocks_gmem = refs[4]
    first = split * config.split_blocks
    last = lax.min(first + config.split_blocks, blocks_gmem[row, 0])
    unmasked = lax.clamp(first, blocks_gmem[row, 1], lax.max(first, last))
    warpgroup = lax.axis_index("warpgroup")
    place = _Place(
        split=split, group=group, row=row, head=head, first=first, unmasked=unmasked, last=last
    )

    @pl.when(first < last)
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
            def _(warp: Array) -> None:
                pl.when(warp == _LOAD_WARP)(functools.partial(_load, shape, refs, scratch, place))
                pl.when(warp == _MULTIPLY_WARP)(functools.partial(_multiply, shape, scratch, place))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Which part of the work a block has; key blocks first .. last - 1, masked from `unmasked`."""

    split: Any
    group: Any
    row: Any
    head: Any
    first: Any
    unmasked: Any
    last: Any


def _each_tile(shape: _Shape, place: _Place, tile: int, act: Any) -> None:  # noqa: ANN401
    """`act(number of rows)` for this tile of whatever group this block has: it is static inside."""
    for group in range(shape.row_groups):
        count = shape.rows_of(group, tile)
        if count > 0:
            pl.when(place.group == group)(functools.partial(act, count))


def _load(shape: _Shape, refs: Any, scratch: dict[str, Any], place: _Place) -> None:  # noqa: ANN401
    """Copy rows and masks, then keys and values as buffers become free."""
    config, stages = shape.config, shape.config.kv_stages
    rows_gmem, keys_gmem, values_gmem, masks_gmem = refs[:4]
    group_rows = config.tiles * TILE_ROWS
    plgpu.copy_gmem_to_smem(
        masks_gmem.at[place.row, :, pl.ds(place.group * group_rows, group_rows)],
        scratch["masks_smem"],
        scratch["masks_ready"].at[0],
    )
    for tile in range(config.tiles):

        def copy_rows(count: int, tile: int = tile) -> None:
            start = place.group * group_rows + tile * TILE_ROWS
            plgpu.copy_gmem_to_smem(
                rows_gmem.at[place.row, place.head, pl.ds(start, count)],
                scratch["rows_smem"].at[tile, pl.ds(0, count)],
                scratch["rows_ready"].at[tile],
            )

        _each_tile(shape, place, tile, copy_rows)

    def copy(block: Array, source: Any, name: str, slot: Array) -> None:  # noqa: ANN401
        target, barrier = scratch[f"{name}_smem"], scratch[f"{name}_ready"].at[slot]
        if shape.page_slots == 0:
            part = source.at[place.row, place.head, pl.ds(block * BLOCK_KV, BLOCK_KV)]
            plgpu.copy_gmem_to_smem(part, target.at[slot], barrier)
            return
        size = min(BLOCK_KV, shape.page_slots)
        for piece in range(shape.copies):
            start = block * BLOCK_KV + piece * size
            page = refs[5][place.row, lax.div(start, shape.page_slots)]
            inside = lax.rem(start, shape.page_slots)
            plgpu.copy_gmem_to_smem(
                source.at[page, place.head, pl.ds(inside, size)],
                target.at[slot, pl.ds(piece * size, size)],
                barrier,
            )

    def step(block: Array, carry: None) -> None:
        count = block - place.first
        slot = lax.rem(count, stages)
        for name, source in (("keys", keys_gmem), ("values", values_gmem)):

            @pl.when(count >= stages)
            def _(name: str = name) -> None:
                plgpu.barrier_wait(scratch[f"{name}_free"].at[slot])

            copy(block, source, name, slot)
        return carry

    lax.fori_loop(place.first, place.last, step, None)
    # Every arrival is awaited before the block ends.
    for slot in range(stages):

        @pl.when(place.last - place.first > slot)
        def _(slot: int = slot) -> None:
            plgpu.barrier_wait(scratch["keys_free"].at[slot])
            plgpu.barrier_wait(scratch["values_free"].at[slot])


def _multiply(shape: _Shape, scratch: dict[str, Any], place: _Place) -> None:
    """Issue the tensor core's products: scores a step ahead of the weighted sums."""
    config = shape.config
    tiles, slots, stages = config.tiles, config.score_slots, config.kv_stages

    def scores(count: Array) -> None:
        """The scores of one key block, for each tile, once their buffer is free."""
        stage = lax.rem(count, stages)
        plgpu.barrier_wait(scratch["keys_ready"].at[stage])
        for tile in range(tiles):
            _in_slot(slots, count, lambda slot, tile=tile: one_scores(count, stage, tile, slot))
        plgpu.tcgen05_commit_arrive(scratch["keys_free"].at[stage])

    def one_scores(count: Array, stage: Array, tile: int, slot: int) -> None:
        buffer = tile * slots + slot

        @pl.when(count >= slots)
        def _() -> None:
            plgpu.barrier_wait(scratch["scores_free"].at[buffer])

        plgpu.tcgen05_mma(
            scratch["scores"][buffer][0],
            scratch["rows_smem"].at[tile],
            scratch["keys_smem"].at[stage].T,
            accumulate=False,
        )
        plgpu.tcgen05_commit_arrive(scratch["scores_ready"].at[buffer])

    def sums(count: Array) -> None:
        """The weighted sums of one block of values, for each tile, once its weights are there."""
        stage = lax.rem(count, stages)
        plgpu.barrier_wait(scratch["values_ready"].at[stage])
        for tile in range(tiles):
            _in_slot(slots, count, lambda slot, tile=tile: one_sum(count, stage, tile, slot))
        plgpu.tcgen05_commit_arrive(scratch["values_free"].at[stage])

    def one_sum(count: Array, stage: Array, tile: int, slot: int) -> None:
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
        _each_tile(
            shape,
            place,
            tile,
            lambda _, tile=tile: plgpu.barrier_wait(scratch["rows_ready"].at[tile]),
        )
    scores(jnp.int32(0))

    def step(count: Array, carry: None) -> None:
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


def _in_slot(slots: int, count: Array, act: Any) -> None:  # noqa: ANN401
    """`act(slot)` with the slot count % slots, static inside: unions cannot be indexed."""
    if slots == 1:
        act(0)
        return
    for slot in range(slots):
        pl.when(lax.rem(count, slots) == slot)(functools.partial(act, slot))


def _softmax(
    shape: _Shape,
    interpreted: bool,
    refs: Any,  # noqa: ANN401
    scratch: dict[str, Any],
    place: _Place,
    tile: int,
) -> None:
    """Turn scores into weights, keep the running maximum and sum, and write the split's result."""
    if shape.config.tiles == 2:
        plgpu.set_max_registers(_SOFTMAX_REGISTERS, action="increase")
    slots = shape.config.score_slots
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

    def step(masked: bool, block: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        count = block - place.first
        if slots == 1:
            return one(masked, block, 0, *carry)
        return lax.cond(
            lax.rem(count, slots) == 0,
            functools.partial(one, masked, block, 0),
            functools.partial(one, masked, block, 1),
            *carry,
        )

    def one(masked: bool, block: Array, slot: int, top: Array, total: Array) -> tuple[Array, Array]:
        buffer = tile * slots + slot
        scores_ref, weights_ref = scratch["scores"][buffer]
        plgpu.barrier_wait(scratch["scores_ready"].at[buffer])
        chunks = []
        for start in range(0, BLOCK_KV, _CHUNK):
            chunk = plgpu.async_load_tmem(
                scores_ref.at[:, pl.ds(start, _CHUNK)], layout=TMEM_LAYOUT
            )
            chunks.append(_mask(chunk, masks, block * BLOCK_KV + start) if masked else chunk)
        new_top = top
        for chunk in chunks:
            new_top = jnp.maximum(new_top, jnp.max(chunk, axis=1))
        # A row that has seen nothing yet keeps a top of minus infinity, and weights of zero.
        base = jnp.where(new_top == -jnp.inf, jnp.float32(0), new_top) * log2_scale
        factor = jnp.exp2(jnp.where(top == -jnp.inf, -jnp.inf, top * log2_scale - base))
        plgpu.wait_load_tmem()
        total = total * factor
        for i, chunk in enumerate(chunks):
            weights = jnp.exp2(chunk * log2_scale - _columns(base, _CHUNK))
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
                    plgpu.wait_load_tmem()
                    plgpu.async_store_tmem(part, old * _columns(factor, _CHUNK))
                plgpu.commit_tmem()

        plgpu.barrier_arrive(scratch["weights_ready"].at[buffer])
        return new_top, total

    nothing = plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), TMEM_ROW_LAYOUT)
    zero = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), TMEM_ROW_LAYOUT)
    carry = (nothing, zero)
    carry = lax.fori_loop(place.first, place.unmasked, functools.partial(step, False), carry)
    top, total = lax.fori_loop(place.unmasked, place.last, functools.partial(step, True), carry)
    plgpu.barrier_wait(scratch["out_ready"].at[tile])
    seen = total > 0
    lse = top * log2_scale + jnp.log2(jnp.where(seen, total, jnp.float32(1)))
    inverse = 1 / jnp.where(seen, total, jnp.float32(1))
    lse_smem, out_smem = scratch["lse_smem"].at[tile], scratch["out_smem"].at[tile]
    store(lse_smem, jnp.where(seen, lse, -jnp.inf))
    start_row = (place.group * shape.config.tiles + tile) * TILE_ROWS
    out_gmem, lse_gmem = refs[-2:]
    where = (place.row, place.head, place.split)
    for start in range(0, shape.head_dim, _OUT_CHUNK):
        part = plgpu.async_load_tmem(out.at[:, pl.ds(start, _OUT_CHUNK)], layout=TMEM_LAYOUT)
        if start:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = part * _columns(inverse, _OUT_CHUNK)
        plgpu.commit_smem()

        def write(count: int, start: int = start) -> None:
            rows = pl.ds(start_row, count)
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(0, count)], out_gmem.at[*where, rows, pl.ds(start, _OUT_CHUNK)]
            )
            if start == 0:
                plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, count)], lse_gmem.at[*where, rows])

        _each_tile(shape, place, tile, write)
    plgpu.wait_load_tmem()
    plgpu.wait_smem_to_gmem(0)


def _mask(scores: Array, masks: list[Array], first_slot: Array) -> Array:
    """Scores with minus infinity where a row does not see the slot of that column."""
    shape = scores.shape
    slot = first_slot + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TMEM_LAYOUT)
    distance = slot - _columns(masks[0], shape[1])
    seen = distance < 0
    if len(masks) > 1:
        low, high = (_columns(word, shape[1]) for word in masks[1:])
        word = jnp.where(distance < 32, low, high)
        bit = lax.shift_right_logical(word, distance & 31) & 1
        seen = seen | ((distance < 64) & (bit == 1))
    return jnp.where(seen, scores, -jnp.inf)


def _columns(row_values: Array, number: int) -> Array:
    """One value a row as a matrix of that many equal columns."""
    return lax.broadcast_in_dim(row_values, (row_values.shape[0], number), (0,))


def _pad_axis(x: Array, axis: int, size: int) -> Array:
    """X with zeros at the end of an axis, up to that size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


KERNELS = kernels(attend, unsupported)
