"""Which rows and keys the blocks of the forward kernel work on, and in which order.

An item is a piece of work: some query tiles of one head, and the blocks of keys that they see. The
functions run inside the kernel: every role works out the same items from the same numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention_config import TILE_ROWS
from pallas_kernels.compat import Ref

_L2_BYTES = 50 << 20  # of keys and values that blocks running at the same time should share


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Numbers of one piece of work, known when the kernel runs."""

    batch: Any
    head: Any
    kv_head: Any
    row: Any  # of the first tile
    first_block: Any  # of keys that anybody sees
    num_blocks: Sequence[Any]  # by tile, from first_block on; 0 if the tile sees nothing
    start: Any  # position of row 0
    length: Any  # keys that exist

    @property
    def most_blocks(self) -> jax.Array:
        """Blocks of keys to load."""
        most = self.num_blocks[0]
        for count in self.num_blocks[1:]:
            most = lax.max(most, count)
        return most


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Shapes and visibility of a call, known when the kernel is traced."""

    batch: int
    num_tokens: int
    num_slots: int
    num_heads: int
    num_kv_heads: int
    head_bytes: int  # of one key
    tiles: int
    blocks: int  # that work together and have 128 rows of each tile
    block_kv: int
    causal: bool
    window: int | None
    has_bounds: bool  # the kernel is told each row's start and length

    @property
    def tile_rows(self) -> int:
        """Query rows of a tile."""
        return self.blocks * TILE_ROWS

    @property
    def rows(self) -> int:
        """Query rows of an item."""
        return self.tiles * self.tile_rows

    @property
    def num_row_blocks(self) -> int:
        """Items that a head takes."""
        return pl.cdiv(self.num_tokens, self.rows)

    @property
    def num_items(self) -> int:
        """Items of the whole call."""
        return self.batch * self.num_heads * self.num_row_blocks

    @property
    def is_masked(self) -> bool:
        """Whether any block of keys is seen in part only."""
        ragged = self.num_slots % self.block_kv != 0
        return self.causal or self.has_bounds or self.window is not None or ragged

    @property
    def heads_at_once(self) -> int:
        """Heads whose keys and values fit L2 together: a divisor of all heads, whole groups."""
        group = self.num_heads // self.num_kv_heads
        pairs = self.batch * self.num_kv_heads
        fitting = max(1, _L2_BYTES // (2 * self.num_slots * self.head_bytes))
        return group * max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= fitting)

    def item(self, index: jax.Array, bounds: Ref | None) -> Item:
        """The index-th piece of work.

        Heads that share keys run side by side, and of a causal call the items with most keys come
        first, so that the last ones to run are short. `bounds` [B 2] holds start and length of each
        row, None without bounds.
        """
        group, rest = _divide(index, self.heads_at_once * self.num_row_blocks)
        row_block, head = _divide(rest, self.heads_at_once)
        batch, head = _divide(group * self.heads_at_once + head, self.num_heads)
        if self.causal:
            row_block = self.num_row_blocks - 1 - row_block
        row = row_block * self.rows
        start, length = jnp.int32(0), jnp.int32(self.num_slots)
        if bounds is not None:
            start, length = bounds[batch, 0], bounds[batch, 1]
        first_block = jnp.int32(0)
        if self.window is not None:
            first_block = lax.div(lax.max(start + row - (self.window - 1), 0), self.block_kv)
        num_blocks = []
        for tile in range(self.tiles):
            first_row = row + tile * self.tile_rows
            end = length
            if self.causal:
                end = lax.min(end, start + first_row + self.tile_rows)
            count = lax.max(_divide_up(end, self.block_kv) - first_block, 0)
            num_blocks.append(jnp.where(first_row < self.num_tokens, count, 0))
        return Item(
            batch=batch,
            head=head,
            kv_head=lax.div(head, self.num_heads // self.num_kv_heads),
            row=row,
            first_block=first_block,
            num_blocks=num_blocks,
            start=start,
            length=length,
        )

    def first_row(self, item: Item, tile: int, rank: jax.Array) -> jax.Array:
        """The first of the 128 rows of a tile that the block of that rank has."""
        return item.row + tile * self.tile_rows + rank * TILE_ROWS

    def unmasked(self, item: Item, tile: int, first_row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The range of an item's key blocks that a block's rows of a tile see whole."""
        position, count = item.start + first_row, item.num_blocks[tile]
        begin, end = jnp.int32(0), item.length
        if self.causal:
            end = lax.min(end, position + 1)
        end = lax.min(lax.max(lax.div(end, self.block_kv) - item.first_block, 0), count)
        if self.window is not None:
            low = lax.max(position + (TILE_ROWS - self.window), 0)
            begin = lax.max(_divide_up(low, self.block_kv) - item.first_block, 0)
            begin = lax.min(begin, count)
            end = lax.max(end, begin)
        return begin, end


def _divide(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _divide_up(number: jax.Array, by: int) -> jax.Array:
    return lax.div(number + (by - 1), jnp.int32(by))
