"""What the warpgroups of the Blackwell forward do (`forward_sm100` launches them).

A block of four warpgroups works on two query tiles of 128 rows that share every key and value it
loads:

    softmax 0, softmax 1   scores -> weights of one tile each, one row a thread
    correction             rescales the accumulators when a maximum has grown, and writes the output
    tensor                 one warp loads (TMA), one multiplies (tcgen05)

The tensor core multiplies for one tile while the other is in its softmax. Scores, weights and
accumulators live in tensor memory. All hand-overs are barriers; `_Buffers` says who tells whom
what. Source: the structure of FlashAttention-4 (flash_attn/cute/flash_fwd_sm100.py), for Pallas.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_config import OUT_COLUMNS, TILE_ROWS, ForwardConfig
from pallas_kernels.compat import (
    OUT_LAYOUT,
    OUT_ROW_LAYOUT,
    TMEM_LAYOUT,
    TMEM_ROW_LAYOUT,
    Ref,
    store,
    tiled_smem,
    wait_tmem_loads,
    wait_tmem_stores,
    warp_any,
)
from pallas_kernels.exp2 import LOG2_E, exp2_polynomial
from pallas_kernels.forward_schedule import Item, Schedule

_LOAD_WARP, _MULTIPLY_WARP = 0, 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """What the warpgroups of a block share.

    A barrier's name says what has become true when it completes; `[tile]` and `[slot]` are indices.
    """

    query: Ref  # SMEM [tile, 128, H]
    keys: Ref  # SMEM [slot, block_kv, H]
    values: Ref  # SMEM [slot, block_kv, H]
    factors: Ref  # SMEM [tile, 3, 128]: growth of the scale; normalisation, two items' worth
    staging: Ref  # SMEM [out_stages, 128, OUT_COLUMNS]
    scores: Sequence[Ref]  # TMEM [128, block_kv] a tile
    weights: Sequence[Ref]  # TMEM [128, block_kv] a tile
    accumulators: Sequence[Ref]  # TMEM [128, H] a tile
    query_loaded: Ref  # [tile] load -> multiply
    query_used: Ref  # multiply -> load
    keys_loaded: Ref  # [slot] load -> multiply
    keys_used: Ref  # [slot] multiply -> load
    values_loaded: Ref  # [slot] load -> multiply
    values_used: Ref  # [slot] multiply -> load
    scores_ready: Ref  # [tile] multiply -> softmax; all products before are complete too
    weights_ready: Ref  # [tile] softmax -> multiply; the scores have been read
    growth_ready: Ref  # [tile] softmax -> correction; the product before is complete
    accumulator_ready: Ref  # [tile] correction -> multiply: rescaled, or read and free again
    normalisation_ready: Ref  # [tile, item % 2] softmax -> correction
    product_done: Ref  # [tile] multiply -> correction: the item's last product
    weights_used: Ref  # [tile] multiply -> itself, with the overlay "wait"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKernel:
    """All that is known when the kernel is traced, and the kernel itself."""

    config: ForwardConfig
    schedule: Schedule
    head_dim: int
    dtype: Any
    scale: float
    soft_cap: float | None
    interpreted: bool

    @property
    def score_scale(self) -> float:
        """From what the exponentials subtract to base 2."""
        return (1.0 if self.soft_cap else self.scale) * LOG2_E

    @property
    def pair_axis(self) -> str | None:
        """The axis of the blocks that multiply together."""
        return "pair" if self.config.pair else None

    # ------------------------------------------------------------------ memory

    def scratch_types(self) -> dict[str, Any]:
        """The buffers and barriers, in the order of `_Buffers`."""
        config, tiles, stages = self.config, self.config.tiles, self.config.kv_stages
        tensor = {"orders_tensor_core": True}
        tmem = functools.partial(plgpu.TMEM, collective=config.pair)
        scores = tmem((TILE_ROWS, config.block_kv), jnp.float32)
        weights = tmem((TILE_ROWS, config.block_kv), self.dtype, packed=True)
        if config.overlay != "none":
            overlaid = {f"overlaid_{t}": plgpu.RefUnion(scores, weights) for t in range(tiles)}
        else:
            overlaid = {f"scores_{t}": scores for t in range(tiles)}
            overlaid |= {f"weights_{t}": weights for t in range(tiles)}
        accumulator = tmem((TILE_ROWS, self.head_dim), jnp.float32)
        to_multiply = plgpu.Barrier(num_barriers=tiles, **tensor)
        if config.pair:  # both blocks tell the first one, which multiplies for both
            to_multiply = plgpu.ClusterBarrier(
                collective_axes=("pair",), num_barriers=tiles, leader_tracked=True, **tensor
            )
        keys, columns = config.block_kv // config.blocks, self.head_dim // config.blocks
        waits = {"weights_used": plgpu.Barrier(num_barriers=tiles, **tensor)}
        return {
            "query": tiled_smem((tiles, TILE_ROWS, self.head_dim), self.dtype),
            "keys": tiled_smem((stages, keys, self.head_dim), self.dtype),
            "values": tiled_smem((stages, config.block_kv, columns), self.dtype),
            "factors": plgpu.SMEM((tiles, 3, TILE_ROWS), jnp.float32),
            "staging": tiled_smem((config.out_stages, TILE_ROWS, OUT_COLUMNS), self.dtype),
            **overlaid,
            **{f"accumulator_{t}": accumulator for t in range(tiles)},
            "query_loaded": plgpu.Barrier(num_barriers=tiles),
            "query_used": plgpu.Barrier(**tensor),
            "keys_loaded": plgpu.Barrier(num_barriers=stages),
            "keys_used": plgpu.Barrier(num_barriers=stages, **tensor),
            "values_loaded": plgpu.Barrier(num_barriers=stages),
            "values_used": plgpu.Barrier(num_barriers=stages, **tensor),
            "scores_ready": plgpu.Barrier(num_barriers=tiles, **tensor),
            "weights_ready": to_multiply,
            "growth_ready": plgpu.Barrier(num_barriers=tiles, **tensor),
            "accumulator_ready": to_multiply,
            "normalisation_ready": plgpu.Barrier(num_barriers=(tiles, 2)),
            "product_done": plgpu.Barrier(num_barriers=tiles, **tensor),
            **(waits if config.overlay == "wait" else {}),
        }

    # ------------------------------------------------------------------ kernel

    def body(self, *arrays: Ref, **scratch: Ref) -> None:
        """The whole kernel: every warpgroup takes its role."""
        tiles = range(self.config.tiles)
        if self.config.overlay != "none":
            pairs = [scratch.pop(f"overlaid_{t}") for t in tiles]
            scores, weights = zip(*pairs, strict=True)
        else:
            scores = [scratch.pop(f"scores_{t}") for t in tiles]
            weights = [scratch.pop(f"weights_{t}") for t in tiles]
        accumulators = [scratch.pop(f"accumulator_{t}") for t in tiles]
        buffers = _Buffers(
            scores=scores,
            weights=weights,
            accumulators=accumulators,
            **{"weights_used": None, **scratch},
        )
        query, key, value, *told, out, lse = arrays
        bounds = told[0] if told else None
        warpgroup = lax.axis_index("warpgroup")
        rank = lax.axis_index("pair") if self.config.pair else jnp.int32(0)
        softmax, correction, other = self.config.registers

        for tile in tiles:

            @pl.when(warpgroup == tile)
            def _softmax(tile: int = tile) -> None:
                plgpu.set_max_registers(softmax, action="increase")
                self._softmax(buffers, bounds, lse, tile, rank)

        @pl.when(warpgroup == len(tiles))
        def _correct() -> None:
            plgpu.set_max_registers(correction, action="decrease")
            self._correct(buffers, bounds, out, rank)

        @pl.when(warpgroup == len(tiles) + 1)
        def _tensor() -> None:
            plgpu.set_max_registers(other, action="decrease")

            @plgpu.warp_map
            def _warps(warp: jax.Array) -> None:
                @pl.when(warp == _LOAD_WARP)
                def _load() -> None:
                    self._load(buffers, bounds, query, key, value)

                @pl.when((warp == _MULTIPLY_WARP) & (rank == 0))
                def _multiply() -> None:
                    self._multiply(buffers, bounds)

    def _for_each_item[Carry](
        self, bounds: Ref | None, body: Callable[[Item, Carry], Carry], carry: Carry
    ) -> Carry:
        """Run body(item, carry) -> carry over this program's share of the items."""

        @plgpu.nd_loop((self.schedule.num_items,), collective_axes="program", init_carry=carry)
        def loop(info: plgpu.NDLoopInfo, carry: Carry) -> Carry:
            return body(self.schedule.item(info.index[0], bounds), carry)

        return loop

    # ------------------------------------------------------------------ load and multiply

    def _load(
        self, buffers: _Buffers, bounds: Ref | None, query: Ref, key: Ref, value: Ref
    ) -> None:
        config, stages = self.config, self.config.kv_stages

        def fill(
            ring: Ref, loaded: Ref, used: Ref, source: Ref, count: jax.Array, axis: int
        ) -> None:
            slot = lax.rem(count, stages)

            @pl.when(count >= stages)
            def _() -> None:
                plgpu.barrier_wait(used.at[slot])

            self._copy(source, ring.at[slot], loaded.at[slot], axis=axis)

        def body(item: Item, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            blocks, items = carry
            works = item.most_blocks > 0

            @pl.when(works & (items > 0))
            def _() -> None:
                plgpu.barrier_wait(buffers.query_used)

            @pl.when(works)
            def _() -> None:
                for tile in range(config.tiles):
                    tile_rows = self.schedule.tile_rows
                    source = query.at[
                        item.batch, pl.ds(item.row + tile * tile_rows, tile_rows), item.head
                    ]
                    loaded = buffers.query_loaded.at[tile]
                    self._copy(source, buffers.query.at[tile], loaded, axis=0)

            @pl.loop(0, item.most_blocks)
            def _(i: jax.Array) -> None:
                slots = pl.ds((item.first_block + i) * config.block_kv, config.block_kv)
                source = (item.batch, slots, item.kv_head)
                keys, values = key.at[source], value.at[source]
                count = blocks + i
                fill(buffers.keys, buffers.keys_loaded, buffers.keys_used, keys, count, 0)
                fill(buffers.values, buffers.values_loaded, buffers.values_used, values, count, 1)

            return blocks + item.most_blocks, items + works.astype(jnp.int32)

        blocks, items = self._for_each_item(bounds, body, (jnp.int32(0), jnp.int32(0)))

        # Every completion is observed before the kernel ends.
        @pl.when(items > 0)
        def _() -> None:
            plgpu.barrier_wait(buffers.query_used)

        @pl.loop(lax.max(blocks - stages, 0), blocks)
        def _(count: jax.Array) -> None:
            plgpu.barrier_wait(buffers.keys_used.at[lax.rem(count, stages)])
            plgpu.barrier_wait(buffers.values_used.at[lax.rem(count, stages)])

    def _copy(self, source: Ref, target: Ref, loaded: Ref, *, axis: int) -> None:
        """Load; each block of a pair takes its part along `axis`, and the first is told of both."""
        if self.config.pair:
            part = plgpu.CopyPartition.PARTITIONED(axis)
            plgpu.copy_gmem_to_smem(
                source, target, loaded, collective_axes=self.pair_axis, leader_tracked=part
            )
        else:
            plgpu.copy_gmem_to_smem(source, target, loaded)

    def _commit(self, barrier: Ref) -> None:
        """Tell a barrier, in both blocks of a pair, when all products so far are complete."""
        plgpu.tcgen05_commit_arrive(barrier, self.pair_axis)

    def _multiply(self, buffers: _Buffers, bounds: Ref | None) -> None:
        config, stages = self.config, self.config.kv_stages
        tiles = range(config.tiles)

        def multiply_keys(tile: int, slot: jax.Array) -> None:
            keys = buffers.keys.at[slot].T
            query = buffers.query.at[tile]
            plgpu.tcgen05_mma(
                buffers.scores[tile], query, keys, accumulate=False, collective_axis=self.pair_axis
            )
            self._commit(buffers.scores_ready.at[tile])

        def multiply_values(tile: int, slot: jax.Array, accumulate: jax.Array) -> None:
            plgpu.barrier_wait(buffers.accumulator_ready.at[tile])
            plgpu.barrier_wait(buffers.weights_ready.at[tile])
            accumulator, weights = buffers.accumulators[tile], buffers.weights[tile]
            values = buffers.values.at[slot]
            plgpu.tcgen05_mma(
                accumulator,
                weights,
                values,
                accumulate=accumulate,
                collective_axis=self.pair_axis,
            )
            if config.overlay == "wait":
                self._commit(buffers.weights_used.at[tile])
                plgpu.barrier_wait(buffers.weights_used.at[tile])

        def body(item: Item, blocks: jax.Array) -> jax.Array:
            most = item.most_blocks

            @pl.when(most > 0)
            def _() -> None:
                slot = lax.rem(blocks, stages)
                for tile in tiles:
                    plgpu.barrier_wait(buffers.query_loaded.at[tile])
                plgpu.barrier_wait(buffers.keys_loaded.at[slot])
                for tile in tiles:

                    @pl.when(item.num_blocks[tile] > 0)
                    def _(tile: int = tile) -> None:
                        multiply_keys(tile, slot)

                self._commit(buffers.keys_used.at[slot])

                @pl.when(most == 1)
                def _() -> None:
                    self._commit(buffers.query_used)

            @pl.loop(0, most)
            def _(i: jax.Array) -> None:
                slot, next_slot = lax.rem(blocks + i, stages), lax.rem(blocks + i + 1, stages)
                plgpu.barrier_wait(buffers.values_loaded.at[slot])

                @pl.when(i + 1 < most)
                def _() -> None:
                    plgpu.barrier_wait(buffers.keys_loaded.at[next_slot])

                for tile in tiles:
                    count = item.num_blocks[tile]

                    @pl.when(i < count)
                    def _(tile: int = tile) -> None:
                        multiply_values(tile, slot, i > 0)

                    @pl.when(i + 1 < count)
                    def _(tile: int = tile) -> None:
                        multiply_keys(tile, next_slot)

                    @pl.when(i + 1 == count)
                    def _(tile: int = tile) -> None:
                        self._commit(buffers.product_done.at[tile])

                self._commit(buffers.values_used.at[slot])

                @pl.when(i + 1 < most)
                def _() -> None:
                    self._commit(buffers.keys_used.at[next_slot])

                @pl.when(i + 2 == most)
                def _() -> None:
                    self._commit(buffers.query_used)

            return blocks + most

        self._for_each_item(bounds, body, jnp.int32(0))
        for tile in tiles:
            plgpu.barrier_wait(buffers.accumulator_ready.at[tile])

    # ------------------------------------------------------------------ softmax

    def _softmax(
        self, buffers: _Buffers, bounds: Ref | None, lse: Ref, tile: int, rank: jax.Array
    ) -> None:
        def body(item: Item, items: jax.Array) -> jax.Array:
            count = item.num_blocks[tile]
            first_row = self.schedule.first_row(item, tile, rank)
            top = plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), TMEM_ROW_LAYOUT)
            total = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.float32), TMEM_ROW_LAYOUT)
            carry = (top, total)
            if not self.schedule.is_masked:
                step = self._step(buffers, item, tile, first_row, masked=False)
                carry = lax.fori_loop(0, count, step, carry)
            else:
                masked_step = self._step(buffers, item, tile, first_row, masked=True)
                step = self._step(buffers, item, tile, first_row, masked=False)
                begin, end = self.schedule.unmasked(item, tile, first_row)
                if self.schedule.window is not None:
                    carry = lax.fori_loop(0, begin, masked_step, carry)
                carry = lax.fori_loop(begin, end, step, carry)
                carry = lax.fori_loop(end, count, masked_step, carry)
            top, total = carry

            @pl.when(count > 0)
            def _() -> None:
                slot = lax.rem(items, 2)
                inverse = 1.0 / jnp.where(total == 0, 1.0, total)
                buffers.factors[tile, 1 + slot] = inverse
                plgpu.barrier_arrive(buffers.normalisation_ready.at[tile, slot])

            # A row that sees nothing: minus infinity plus the logarithm of zero.
            natural = (top * self.score_scale + jnp.log2(total)) / LOG2_E
            rows = pl.ds(first_row, TILE_ROWS)
            store(lse.at[item.batch, item.head, rows], natural)
            return items + (count > 0).astype(jnp.int32)

        self._for_each_item(bounds, body, jnp.int32(0))

    def _step(
        self, buffers: _Buffers, item: Item, tile: int, first_row: jax.Array, *, masked: bool
    ) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """What one block of keys does to a tile: (i, (maximum, sum)) -> (maximum, sum)."""
        config = self.config

        def read(i: jax.Array) -> list[jax.Array]:
            chunks = []
            for index in range(config.num_chunks):
                columns = pl.ds(index * config.chunk, config.chunk)
                chunk = plgpu.async_load_tmem(
                    buffers.scores[tile].at[:, columns], layout=TMEM_LAYOUT
                )
                if self.soft_cap:
                    chunk = jnp.tanh(chunk * (self.scale / self.soft_cap)) * self.soft_cap
                if masked:
                    slot = (item.first_block + i) * config.block_kv + index * config.chunk
                    chunk = self._mask(chunk, slot, item.start + first_row, item.length)
                chunks.append(chunk)
            return chunks

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            top, total = carry
            plgpu.barrier_wait(buffers.scores_ready.at[tile])
            scores = read(i)
            highest = top
            for chunk in scores:
                highest = jnp.maximum(highest, chunk.max(axis=1))
            # The first block's minus infinity is less than any threshold allows; the difference of
            # two of them is NaN, which compares false.
            stays = (top - highest) * self.score_scale >= -config.rescale_threshold
            new_top = jnp.where(stays, top, highest)
            shift = new_top
            if masked:
                shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            growth = jnp.where(stays, 1.0, jnp.exp2((top - shift) * self.score_scale))

            @pl.when(i > 0)
            def _() -> None:
                buffers.factors[tile, 0] = growth
                plgpu.barrier_arrive(buffers.growth_ready.at[tile])

            offset = shift * self.score_scale
            wait_tmem_loads(interpret=self.interpreted)
            sums = total * growth
            for index, chunk in enumerate(scores):
                exponents = chunk * self.score_scale - _over_columns(offset, chunk)
                # Masked scores must weigh exactly nothing: the polynomial ends at 2**-125.
                polynomial = config.is_polynomial(index) and not masked
                if polynomial:
                    weights = exp2_polynomial(exponents, degree=config.polynomial_degree)
                else:
                    weights = jnp.exp2(exponents)
                columns = pl.ds(index * config.chunk, config.chunk)
                target = buffers.weights[tile].at[:, columns]
                plgpu.async_store_tmem(target, weights.astype(self.dtype))
                scores[index] = weights
            wait_tmem_stores(interpret=self.interpreted)
            plgpu.barrier_arrive(buffers.weights_ready.at[tile])
            for chunk in scores:
                sums = sums + chunk.sum(axis=1)
            return new_top, sums

        return step

    def _mask(
        self, chunk: jax.Array, slot: jax.Array, position: jax.Array, length: jax.Array
    ) -> jax.Array:
        """Minus infinity where a row at position + its index does not see slot + the column."""

        def indices(axis: int) -> jax.Array:
            return plgpu.broadcasted_iota(jnp.int32, chunk.shape, axis, layout=TMEM_LAYOUT)

        column, row = indices(1), indices(0)
        visible = column < length - slot
        if self.schedule.causal:
            visible = visible & (column <= row + (position - slot))
        if self.schedule.window is not None:
            visible = visible & (column > row + (position - slot - self.schedule.window))
        return jnp.where(visible, chunk, -jnp.inf)

    # ------------------------------------------------------------------ correction and output

    def _correct(self, buffers: _Buffers, bounds: Ref | None, out: Ref, rank: jax.Array) -> None:
        tiles = range(self.config.tiles)
        for tile in tiles:
            plgpu.barrier_arrive(buffers.accumulator_ready.at[tile])

        def body(item: Item, items: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
            @pl.loop(1, item.most_blocks)
            def _(i: jax.Array) -> None:
                for tile in tiles:

                    @pl.when(i < item.num_blocks[tile])
                    def _(tile: int = tile) -> None:
                        self._rescale(buffers, tile)

            for tile in tiles:
                rows = pl.ds(self.schedule.first_row(item, tile, rank), TILE_ROWS)
                target = out.at[item.batch, rows, item.head]
                self._finish(buffers, tile, item.num_blocks[tile], lax.rem(items[tile], 2), target)
            return tuple(
                seen + (count > 0).astype(jnp.int32)
                for seen, count in zip(items, item.num_blocks, strict=True)
            )

        self._for_each_item(bounds, body, tuple(jnp.int32(0) for _ in tiles))
        plgpu.wait_smem_to_gmem(0)

    def _rescale(self, buffers: _Buffers, tile: int) -> None:
        """Bring a tile's accumulator to the scale of its next weights, if any row needs it."""
        plgpu.barrier_wait(buffers.growth_ready.at[tile])
        growth = plgpu.load(buffers.factors.at[tile, 0], layout=TMEM_ROW_LAYOUT)

        @pl.when(warp_any(growth < 1.0, interpret=self.interpreted))
        def _() -> None:
            for column in range(0, self.head_dim, OUT_COLUMNS):
                part = buffers.accumulators[tile].at[:, pl.ds(column, OUT_COLUMNS)]
                values = plgpu.async_load_tmem(part, layout=TMEM_LAYOUT)
                wait_tmem_loads(interpret=self.interpreted)
                plgpu.async_store_tmem(part, values * _over_columns(growth, values))
            wait_tmem_stores(interpret=self.interpreted)

        plgpu.barrier_arrive(buffers.accumulator_ready.at[tile])

    def _finish(
        self, buffers: _Buffers, tile: int, count: jax.Array, slot: jax.Array, target: Ref
    ) -> None:
        """Write a tile's output: the normalised accumulator, or zeros if it saw nothing."""
        stages, parts = self.config.out_stages, self.head_dim // OUT_COLUMNS

        def write(index: int, values: jax.Array) -> None:
            stage = buffers.staging.at[(tile * parts + index) % stages]
            plgpu.wait_smem_to_gmem(stages - 1, wait_read_only=True)
            stage[...] = values.astype(self.dtype)
            plgpu.commit_smem()
            columns = pl.ds(index * OUT_COLUMNS, OUT_COLUMNS)
            plgpu.copy_smem_to_gmem(stage, target.at[:, columns])

        @pl.when(count > 0)
        def _() -> None:
            plgpu.barrier_wait(buffers.normalisation_ready.at[tile, slot])
            inverse = plgpu.load(buffers.factors.at[tile, 1 + slot], layout=OUT_ROW_LAYOUT)
            plgpu.barrier_wait(buffers.product_done.at[tile])
            for index in range(parts):
                columns = pl.ds(index * OUT_COLUMNS, OUT_COLUMNS)
                part = buffers.accumulators[tile].at[:, columns]
                values = plgpu.async_load_tmem(part, layout=OUT_LAYOUT)
                write(index, values * _over_columns(inverse, values))
            wait_tmem_loads(interpret=self.interpreted)
            plgpu.barrier_arrive(buffers.accumulator_ready.at[tile])

        @pl.when(count == 0)
        def _() -> None:
            for index in range(parts):
                zeros = jnp.zeros((TILE_ROWS, OUT_COLUMNS), jnp.float32)
                write(index, plgpu.layout_cast(zeros, OUT_LAYOUT))


def _over_columns(rows: jax.Array, like: jax.Array) -> jax.Array:
    """One number a row, repeated over the columns."""
    return lax.broadcast_in_dim(rows, like.shape, (0,))
