"""What the Blackwell and the Hopper decode kernel share: how work is cut up, and its loading.

All query heads and tokens of one kv head are rows of one matrix, so that keys and values are read
once for all of them. Rows come in tiles; a block works on one or two tiles and on a run of key
blocks (a split). It has one warpgroup per tile for the softmax, and one whose first warp loads.

What a row sees is a limit (all slots before it) and 64 bits (slots limit .. limit + 63). Key blocks
that all rows see completely, which are all but the last few, take a loop without masks.

Each split's result is normalised and comes with its LSE (base 2); `combine_splits` merges them. A
row's result never depends on the batch it is in: splits are runs of a fixed number of blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.combine_splits import combine_splits
from pallas_kernels.compat import Ref
from pallas_kernels.decode_rows import not_one_16_bit_dtype, num_slots_of

BLOCK_KV = 128
_UNSPLIT_BLOCKS, _MOST_SPLIT_BLOCKS = 4, 8
_ROWS_STEP = 8  # rows that are copied in and out: a multiple of the memory tiling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Shape of a kernel.

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


def decode_config(num_rows: int, tile_rows: int, head_dim: int, num_blocks: int) -> DecodeConfig:
    """The configuration for some rows a kv head and a cache of `num_blocks` key blocks.

    A short cache is one split: reading it one block after the other takes less than merging.
    """
    split_blocks = num_blocks if num_blocks <= _UNSPLIT_BLOCKS else -(-num_blocks // 16)
    return DecodeConfig(
        tiles=1 if num_rows <= tile_rows else 2,
        kv_stages=2 if head_dim > 64 else 4,
        split_blocks=min(split_blocks, _MOST_SPLIT_BLOCKS),
    )


def unsupported(query: Any, keys: Any, values: Any, page_table: Any = None) -> str | None:  # noqa: ANN401
    """Why the kernels cannot run with arrays of these shapes and dtypes, or None."""
    if (reason := not_one_16_bit_dtype(query, keys, values)) is not None:
        return reason
    if query.shape[-1] not in (64, 128):
        return f"takes head dims 64 and 128, got {query.shape[-1]}"
    num_slots, page_slots = num_slots_of(keys, page_table), keys.shape[2]
    if num_slots % BLOCK_KV:
        return f"takes caches of a multiple of {BLOCK_KV} slots, got {num_slots}"
    if page_slots % BLOCK_KV and BLOCK_KV % page_slots:
        return f"takes pages of a part or a multiple of {BLOCK_KV} slots, got {page_slots}"
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Everything a kernel is specialised for; `page_slots` is 0 for a dense cache."""

    batch: int
    num_kv_heads: int
    used_rows: int
    tile_rows: int
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

    @property
    def group_rows(self) -> int:
        """Rows of a block's tiles, real or not."""
        return self.config.tiles * self.tile_rows

    def rows_of(self, group: int, tile: int) -> int:
        """Rows of a tile that exist; they are copied in and out."""
        before = (group * self.config.tiles + tile) * self.tile_rows
        return min(self.tile_rows, self.used_rows - before)


@functools.partial(jax.jit, static_argnames=("build", "tile_rows", "scale", "config", "interpret"))
def attend_splits(
    build: Callable[[Shape, Any], Callable[..., Any]],
    tile_rows: int,
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
    """The attended rows, float32, and their LSE (base 2), by the kernel that `build` makes.

    Row m of batch row b sees the slots before limits[b, m] and slot limits[b, m] + i if bit i of
    bits[b, m] is set (the low word first). No row of b sees slots from num_visible[b] on. Without
    a page table keys and values are [B K S H]; with one they are a pool of pages of Z slots, and
    slot s of b lies in page page_table[b, s // Z].
    """
    batch, num_kv_heads, num_rows, head_dim = rows.shape
    num_slots, page_slots = num_slots_of(keys, page_table), keys.shape[2]
    if config is None:
        config = decode_config(num_rows, tile_rows, head_dim, num_slots // BLOCK_KV)
    used = pl.cdiv(num_rows, _ROWS_STEP) * _ROWS_STEP
    groups = pl.cdiv(used, config.tiles * tile_rows)
    limits = limits.astype(jnp.int32)
    num_visible = jnp.minimum(num_visible.astype(jnp.int32), num_slots)
    # Per batch row: slots that any row sees, and how many key blocks all rows see completely.
    bounds = jnp.stack([num_visible, jnp.min(limits, axis=1) // BLOCK_KV], axis=1)
    masks = [limits] if bits is None else [limits, bits[:, :, 0], bits[:, :, 1]]
    shape = Shape(
        batch=batch,
        num_kv_heads=num_kv_heads,
        used_rows=used,
        tile_rows=tile_rows,
        row_groups=groups,
        num_splits=pl.cdiv(num_slots // BLOCK_KV, config.split_blocks),
        head_dim=head_dim,
        num_masks=len(masks),
        page_slots=0 if page_table is None else page_slots,
        dtype=jnp.dtype(rows.dtype).name,
        scale=scale,
        config=config,
    )
    # All small numbers in one array, which XLA makes in one go: a launch costs more than they do.
    padded_rows = groups * shape.group_rows
    numbers = jnp.stack([_pad_axis(x, 1, padded_rows) for x in (*masks, bounds)], axis=1)
    table = () if page_table is None else (page_table.astype(jnp.int32),)
    arrays = (_pad_axis(rows, 2, used), keys, values, numbers)
    outs, lses = build(shape, interpret)(*arrays, *table)
    if shape.num_splits == 1:  # nothing to merge: one launch less, where launches are what counts
        sees = (num_visible > 0)[:, None, None]
        out, lse = outs[:, :, 0, :num_rows], lses[:, :, 0, :num_rows]
        return jnp.where(sees[..., None], out, 0.0), jnp.where(sees, lse, -jnp.inf)
    num_splits = pl.cdiv(num_visible, config.split_blocks * BLOCK_KV)
    out, lse = combine_splits(outs, lses, num_splits, interpret=interpret)
    return out[:, :, :num_rows], lse[:, :, :num_rows]


def out_types(shape: Shape) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What a kernel returns: the values and the LSE of every split; of unused splits, anything."""
    leading = (shape.batch, shape.num_kv_heads, shape.num_splits, shape.used_rows)
    return (
        jax.ShapeDtypeStruct((*leading, shape.head_dim), jnp.float32),
        jax.ShapeDtypeStruct(leading, jnp.float32),
    )


def grid(shape: Shape) -> dict[str, Any]:
    """The arguments of `plgpu.kernel` that lay out the blocks."""
    return {
        "grid": (shape.num_splits, shape.row_groups, shape.batch * shape.num_kv_heads),
        "grid_names": ("split", "group", "head"),
        "num_threads": shape.config.tiles + 1,
        "thread_name": "warpgroup",
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which part of the work a block has; key blocks first .. last - 1, masked from `unmasked`.

    No row sees slots from `visible` on.
    """

    split: Ref
    group: Ref
    row: Ref
    head: Ref
    first: Ref
    unmasked: Ref
    last: Ref
    visible: Ref


def place_of(shape: Shape, numbers: Ref) -> Place:
    """This block's place in the grid; behind the masks, `numbers` has the bounds of each row."""
    split, index = lax.axis_index("split"), lax.axis_index("head")
    row, head = lax.div(index, shape.num_kv_heads), lax.rem(index, shape.num_kv_heads)
    first = split * shape.config.split_blocks
    visible, whole = (numbers[row, shape.num_masks, i] for i in range(2))
    last = lax.min(first + shape.config.split_blocks, lax.div(visible + BLOCK_KV - 1, BLOCK_KV))
    return Place(
        split=split,
        group=lax.axis_index("group"),
        row=row,
        head=head,
        first=first,
        unmasked=lax.clamp(first, whole, lax.max(first, last)),
        last=last,
        visible=visible,
    )


def each_tile(shape: Shape, place: Place, tile: int, act: Callable[[int], None]) -> None:
    """`act(number of rows)` for this tile of whatever group this block has: it is static inside."""
    for group in range(shape.row_groups):
        count = shape.rows_of(group, tile)
        if count > 0:
            pl.when(place.group == group)(functools.partial(act, count))


def load(shape: Shape, refs: tuple[Ref, ...], scratch: dict[str, Ref], place: Place) -> None:
    """Copy rows and masks, then keys and values as buffers become free."""
    config, stages, tile_rows = shape.config, shape.config.kv_stages, shape.tile_rows
    rows_gmem, keys_gmem, values_gmem, numbers_gmem = refs[:4]
    masks, own_rows = (
        pl.ds(0, shape.num_masks),
        pl.ds(place.group * shape.group_rows, shape.group_rows),
    )
    plgpu.copy_gmem_to_smem(
        numbers_gmem.at[place.row, masks, own_rows],
        scratch["masks_smem"],
        scratch["masks_ready"].at[0],
    )
    for tile in range(config.tiles):

        def copy_rows(count: int, tile: int = tile) -> None:
            start = place.group * shape.group_rows + tile * tile_rows
            plgpu.copy_gmem_to_smem(
                rows_gmem.at[place.row, place.head, pl.ds(start, count)],
                scratch["rows_smem"][tile].at[pl.ds(0, count)],
                scratch["rows_ready"].at[tile],
            )

        each_tile(shape, place, tile, copy_rows)

    def copy(block: Ref, source: Ref, name: str, slot: Ref) -> None:
        target, barrier = scratch[f"{name}_smem"], scratch[f"{name}_ready"].at[slot]
        if shape.page_slots == 0:
            part = source.at[place.row, place.head, pl.ds(block * BLOCK_KV, BLOCK_KV)]
            plgpu.copy_gmem_to_smem(part, target.at[slot], barrier)
            return
        size = min(BLOCK_KV, shape.page_slots)
        for piece in range(shape.copies):
            start = block * BLOCK_KV + piece * size
            page = refs[4][place.row, lax.div(start, shape.page_slots)]
            inside = lax.rem(start, shape.page_slots)
            plgpu.copy_gmem_to_smem(
                source.at[page, place.head, pl.ds(inside, size)],
                target.at[slot, pl.ds(piece * size, size)],
                barrier,
            )

    def step(block: Ref, carry: None) -> None:
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


def is_ragged(place: Place, block: Ref) -> Ref:
    """Whether some slots of a block are seen by no row; that is never but in the last block."""
    return (block + 1) * BLOCK_KV > place.visible


def zero_unseen(values: Ref, place: Place, block: Ref) -> None:
    """Zeros in the slots of a block of values that no row sees, there for products to read.

    Such slots have the weight 0 but may hold NaN, and 0 times NaN is NaN.
    """
    shape = (64, min(64, values.shape[1]))  # a part as registers and shared memory are tiled
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)

    def zero(index: Ref, carry: None) -> None:  # a loop, since parts at once take registers
        first = index * shape[0]
        for column in range(0, values.shape[1], shape[1]):
            part = values.at[pl.ds(first, shape[0]), pl.ds(column, shape[1])]
            seen = block * BLOCK_KV + first + row < place.visible
            old = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(seen, old, jnp.zeros((), old.dtype))
        return carry

    lax.fori_loop(0, values.shape[0] // shape[0], zero, None)
    plgpu.commit_smem()


def mask_scores(scores: Ref, masks: list[Ref], first_slot: Ref, layout: plgpu.Layout) -> Ref:
    """Scores with minus infinity where a row does not see the slot of that column."""
    shape = scores.shape
    slot = first_slot + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    distance = slot - columns(masks[0], shape[1])
    seen = distance < 0
    if len(masks) > 1:
        low, high = (columns(word, shape[1]) for word in masks[1:])
        word = jnp.where(distance < 32, low, high)
        bit = lax.shift_right_logical(word, distance & 31) & 1
        seen = seen | ((distance < 64) & (bit == 1))
    return jnp.where(seen, scores, -jnp.inf)


def columns(row_values: Ref, number: int) -> Ref:
    """One value a row as a matrix of that many equal columns."""
    return lax.broadcast_in_dim(row_values, (row_values.shape[0], number), (0,))


def tiled_f32(shape: tuple[int, ...]) -> Ref:
    """Shared memory of float32 rows, swizzled over up to 32 columns."""
    width = min(32, shape[-1])
    tiling = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(4 * width)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.float32, transforms=(tiling, swizzle))


def _pad_axis(x: Array, axis: int, size: int) -> Array:
    """X with zeros at the end of an axis, up to that size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
