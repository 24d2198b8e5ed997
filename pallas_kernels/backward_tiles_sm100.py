"""The two kernels of `backward_sm100`, and what they share.

A third warpgroup feeds the two that compute: its warp 0 loads tiles, its warp 1 issues the matrix
products. Each compute warpgroup takes one half of a tile's columns.
"""

import dataclasses
import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.compat import (
    OUT_LAYOUT,
    TMEM_LAYOUT,
    TMEM_ROW_LAYOUT,
    Ref,
    end_smem_reads,
    tiled_smem,
    wait_tmem_loads,
    wait_tmem_stores,
)
from pallas_kernels.exp2 import LOG2_E
from pallas_kernels.register_budgets import register_budgets

TILE = 128
HALF = TILE // 2
TENSOR_COLUMNS = 512

_COLUMN_LAYOUT = OUT_LAYOUT.reduce(0)
_COMPUTE_REGISTERS, _, _FEEDER_REGISTERS = register_budgets(216, 216, 72)
_TMA_WARP, _MMA_WARP, _FEEDER = 0, 1, 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BackwardConfig:
    """How the two kernels use tensor memory.

    Args:
        share: S^T and dP^T of the dK/dV kernel take turns in one tile. At head dim 128 they must:
            beside both, their 16-bit forms and both sums, 512 columns are too few. None: only
            where they must.
        query_stages: tiles of Q and dO in flight in the dK/dV kernel.
        key_stages: tiles of K in flight in the dQ kernel (V has two).
    """

    share: bool | None = None
    query_stages: int = 2
    key_stages: int = 3

    def __post_init__(self) -> None:
        if self.query_stages < 2 or self.key_stages < 2:
            raise ValueError(f"stages must be at least 2: {self.query_stages=} {self.key_stages=}")

    def shares(self, head_dim: int) -> bool:
        """Whether scores and slopes share tensor memory at this head dim."""
        if self.share is not None:
            return self.share
        return 2 * TILE + 2 * HALF + 2 * head_dim > TENSOR_COLUMNS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Shapes (of padded arrays) and options of one call."""

    batch: int
    num_tokens: int
    num_slots: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: jax.typing.DTypeLike
    causal: bool
    scale: float
    config: BackwardConfig
    interpret: plgpu.InterpretGPUParams | None

    @property
    def interpreted(self) -> bool:
        """Whether the interpreter runs the kernel, which knows no warps."""
        return self.interpret is not None

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.num_heads // self.num_kv_heads

    def smem(self, *stages: int) -> Ref:
        """A tile of rows of head_dim numbers in shared memory, as the tensor core wants it."""
        return tiled_smem((*stages, TILE, self.head_dim), self.dtype)

    def scores(self) -> Ref:
        """A float32 tile of scores in tensor memory."""
        return plgpu.TMEM((TILE, TILE), jnp.float32)

    def weights(self) -> Ref:
        """A 16-bit tile in tensor memory, two numbers a column: a left operand."""
        return plgpu.TMEM((TILE, TILE), self.dtype, packed=True)

    def total(self) -> Ref:
        """A float32 sum over the loop in tensor memory."""
        return plgpu.TMEM((TILE, self.head_dim), jnp.float32)

    def body(self, role: Callable[..., None], *arrays: Ref, **scratch: Ref) -> None:
        """What a block runs, in one place for both kernels."""
        role(*arrays, **scratch)

    def launch(
        self, name: str, role: Callable[..., None], out_type: Ref, scratch: Ref, blocks: int
    ) -> Ref:
        """The kernel: one block of three warpgroups for each index of the one grid axis."""
        return plgpu.kernel(
            functools.partial(self.body, role),
            out_type=out_type,
            scratch_types=scratch,
            grid=(blocks,),
            grid_names=("block",),
            num_threads=3,
            thread_name="warpgroup",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.interpret,
        )


def _tensor_barrier(arrivals: int = 1, count: int = 1) -> Ref:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count, orders_tensor_core=True)


def _divided(x: Ref, y: Ref) -> tuple[Ref, Ref]:
    """Quotient and remainder of non-negative int32 scalars."""
    y = jnp.int32(y)
    return lax.div(x, y), lax.rem(x, y)


def _run_roles(
    compute: Callable[[Ref], None], load: Callable[[], None], multiply: Callable[[], None]
) -> None:
    """Warpgroups 0 and 1 compute; of warpgroup 2 one warp loads and one multiplies."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _FEEDER)
    def _compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == _FEEDER)
    def _feed() -> None:
        plgpu.set_max_registers(_FEEDER_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _warp(warp: Ref) -> None:
            pl.when(warp == _TMA_WARP)(load)
            pl.when(warp == _MMA_WARP)(multiply)


def _store(total: Ref, factor: float, staging: Ref, out: Ref) -> None:
    """Writes a tile from tensor memory to `out`, times a factor, by way of shared memory."""
    for column in range(0, staging.shape[1], 64):
        columns = pl.ds(column, 64)
        part = plgpu.async_load_tmem(total.at[:, columns])
        staging[:, columns] = (part * jnp.float32(factor)).astype(staging.dtype)
    plgpu.wait_load_tmem()
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)
    plgpu.wait_smem_to_gmem(0)


def _columns(ref: Ref, first: Ref) -> Ref:
    return ref.at[:, pl.ds(first, HALF)]


def key_value_gradient_kernel(problem: Problem) -> Callable[..., tuple[Array, Array]]:
    """The kernel (query, key, value, out_gradient, stats) -> (key gradient, value gradient)."""
    shared = problem.config.shares(problem.head_dim)
    stages = problem.config.query_stages
    query_tiles, key_tiles = problem.num_tokens // TILE, problem.num_slots // TILE
    group = problem.group
    sequences = problem.batch * problem.num_kv_heads

    def body(*arrays: Ref, **scratch: Ref) -> None:
        query, key, value, out_gradient, stats, key_gradient, value_gradient = arrays
        memory = types.SimpleNamespace(**scratch)
        # Causal: the first key tiles are seen by the most queries and come first.
        tile, sequence = _divided(lax.axis_index("block"), sequences)
        batch, kv_head = _divided(sequence, problem.num_kv_heads)
        owned = pl.ds(tile * TILE, TILE)
        first = tile if problem.causal else jnp.int32(0)
        num_masked = group if problem.causal else 0
        num_plain = query_tiles - first - (1 if problem.causal else 0)
        num_steps = num_masked + group * num_plain
        scores = memory.scores
        slopes = scores if shared else memory.slopes

        def position(step: Ref) -> tuple[Ref, Ref]:
            """Head and query tile of a step: the tiles on the diagonal first, then by head."""
            member, after = _divided(jnp.maximum(step - num_masked, 0), jnp.maximum(num_plain, 1))
            if problem.causal:
                on_diagonal = step < num_masked
                member = jnp.where(on_diagonal, step, member)
                after = jnp.where(on_diagonal, 0, after + 1)
            return kv_head * group + member, first + after

        def load() -> None:
            plgpu.copy_gmem_to_smem(key.at[batch, owned, kv_head], memory.keys, memory.keys_full)
            plgpu.copy_gmem_to_smem(
                value.at[batch, owned, kv_head], memory.values, memory.keys_full
            )

            @pl.loop(0, num_steps)
            def _step(step: Ref) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                head, query_tile = position(step)
                there = pl.ds(query_tile * TILE, TILE)

                # Output gradients are free a product earlier than queries and rows.
                @pl.when(step >= stages)
                def _wait_gradients() -> None:
                    plgpu.barrier_wait(memory.gradients_free.at[slot])

                plgpu.copy_gmem_to_smem(
                    out_gradient.at[batch, there, head],
                    memory.gradients.at[slot],
                    memory.gradients_full.at[slot],
                )

                @pl.when(step >= stages)
                def _wait_queries() -> None:
                    plgpu.barrier_wait(memory.queries_free.at[slot])
                    end_smem_reads(interpret=problem.interpreted)

                plgpu.copy_gmem_to_smem(
                    query.at[batch, there, head],
                    memory.queries.at[slot],
                    memory.queries_full.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    stats.at[batch, head, :, there],
                    memory.rows.at[slot],
                    memory.queries_full.at[slot],
                )

            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def _drain(step: Ref) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(memory.queries_free.at[slot])
                plgpu.barrier_wait(memory.gradients_free.at[slot])

        def multiply() -> None:
            def score(step: Ref) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(memory.queries_full.at[slot])
                plgpu.tcgen05_mma(
                    scores, memory.keys, memory.queries.at[slot].transpose((1, 0)), accumulate=False
                )
                plgpu.tcgen05_commit_arrive(memory.scores_full)

            def slope(step: Ref) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(memory.gradients_full.at[slot])
                plgpu.tcgen05_mma(
                    slopes,
                    memory.values,
                    memory.gradients.at[slot].transpose((1, 0)),
                    accumulate=False,
                )
                plgpu.tcgen05_commit_arrive(memory.slopes_full)

            def value_product(step: Ref) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.tcgen05_mma(
                    memory.value_total,
                    memory.weights,
                    memory.gradients.at[slot],
                    accumulate=step > 0,
                )
                plgpu.tcgen05_commit_arrive(memory.gradients_free.at[slot])

            def key_product(step: Ref) -> None:
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(memory.slopes_ready)
                plgpu.tcgen05_mma(
                    memory.key_total,
                    memory.slope_weights,
                    memory.queries.at[slot],
                    accumulate=step > 0,
                )
                plgpu.tcgen05_commit_arrive(memory.queries_free.at[slot])
                plgpu.tcgen05_commit_arrive(memory.key_product_done)

            plgpu.tcgen05_commit_arrive(memory.key_product_done)  # of the step before the first
            plgpu.barrier_wait(memory.keys_full)
            score(jnp.int32(0))
            plgpu.barrier_wait(memory.scores_free)
            slope(jnp.int32(0))

            # What a step's weights wait for is computed while the step before is multiplied.
            @pl.loop(0, num_steps - 1)
            def _step(step: Ref) -> None:
                if not shared:
                    score(step + 1)
                plgpu.barrier_wait(memory.weights_ready)
                if shared:
                    score(step + 1)
                value_product(step)
                plgpu.barrier_wait(memory.scores_free)
                slope(step + 1)
                key_product(step)

            plgpu.barrier_wait(memory.weights_ready)
            value_product(num_steps - 1)
            key_product(num_steps - 1)

        def compute(warpgroup: Ref) -> None:
            here = warpgroup * HALF

            def load_half(tile_ref: Ref) -> Ref:
                return plgpu.async_load_tmem(_columns(tile_ref, here), layout=OUT_LAYOUT)

            def store_half(tile_ref: Ref, part: Ref) -> None:
                plgpu.async_store_tmem(_columns(tile_ref, here), part.astype(problem.dtype))

            def step_body(step: Ref, masked: bool) -> None:
                rows = memory.rows.at[lax.rem(step, jnp.int32(stages))]
                columns = pl.ds(here, HALF)
                plgpu.barrier_wait(memory.scores_full)
                part = load_half(scores)
                wait_tmem_loads(interpret=problem.interpreted)
                plgpu.barrier_arrive(memory.scores_free)
                lse = plgpu.load(rows.at[0, columns], layout=_COLUMN_LAYOUT)
                part = part * jnp.float32(problem.scale * LOG2_E)
                part = jnp.exp2(part - lax.broadcast_in_dim(lse, part.shape, [1]))
                if masked:
                    part = jnp.where(_seen(here), part, 0.0)
                # Full slopes also say that the last product with the weights is complete.
                plgpu.barrier_wait(memory.slopes_full)
                slope = load_half(slopes)
                store_half(memory.weights, part)
                wait_tmem_loads(interpret=problem.interpreted)
                wait_tmem_stores(interpret=problem.interpreted)
                plgpu.barrier_arrive(memory.weights_ready)
                delta = plgpu.load(rows.at[1, columns], layout=_COLUMN_LAYOUT)
                slope = part * (slope - lax.broadcast_in_dim(delta, part.shape, [1]))
                plgpu.barrier_wait(memory.key_product_done)
                store_half(memory.slope_weights, slope)
                wait_tmem_stores(interpret=problem.interpreted)
                plgpu.barrier_arrive(memory.slopes_ready)

            if problem.causal:
                lax.fori_loop(0, num_masked, lambda step, _: step_body(step, True), None)
            lax.fori_loop(num_masked, num_steps, lambda step, _: step_body(step, False), None)
            plgpu.barrier_wait(memory.key_product_done)

            @pl.when(warpgroup == 0)
            def _value() -> None:
                _store(
                    memory.value_total, 1.0, memory.values, value_gradient.at[batch, owned, kv_head]
                )

            @pl.when(warpgroup == 1)
            def _key() -> None:
                _store(
                    memory.key_total,
                    problem.scale,
                    memory.keys,
                    key_gradient.at[batch, owned, kv_head],
                )

        _run_roles(compute, load, multiply)

    scratch = {
        "keys": problem.smem(),
        "values": problem.smem(),
        "queries": problem.smem(stages),
        "gradients": problem.smem(stages),
        "rows": plgpu.SMEM((stages, 2, TILE), jnp.float32),
        "scores": problem.scores(),
        "slopes": None if shared else problem.scores(),
        "weights": problem.weights(),
        "slope_weights": problem.weights(),
        "key_total": problem.total(),
        "value_total": problem.total(),
        "keys_full": plgpu.Barrier(num_arrivals=2),
        "queries_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "gradients_full": plgpu.Barrier(num_barriers=stages),
        "queries_free": _tensor_barrier(count=stages),
        "gradients_free": _tensor_barrier(count=stages),
        "scores_full": _tensor_barrier(),
        "scores_free": _tensor_barrier(2),
        "slopes_full": _tensor_barrier(),
        "weights_ready": _tensor_barrier(2),
        "slopes_ready": _tensor_barrier(2),
        "key_product_done": _tensor_barrier(),
    }
    shape = (problem.batch, problem.num_slots, problem.num_kv_heads, problem.head_dim)
    outputs = [jax.ShapeDtypeStruct(shape, problem.dtype)] * 2
    return problem.launch(
        "attention_key_value_gradient", body, outputs, scratch, key_tiles * sequences
    )


def _seen(first_column: Ref) -> Ref:
    """Where a transposed tile on the diagonal is visible: key (row) at or before query (column)."""
    shape = (TILE, HALF)
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=OUT_LAYOUT)
    columns = first_column + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=OUT_LAYOUT)
    return rows <= columns


def query_gradient_kernel(problem: Problem) -> Callable[..., Array]:
    """The kernel (query, key, value, out_gradient, stats, limits) -> query gradient.

    `limits` [B] int32 counts the slots of each sequence that may be seen.
    """
    stages, value_stages = problem.config.key_stages, 2
    query_tiles = problem.num_tokens // TILE
    sequences = problem.batch * problem.num_heads

    def body(*arrays: Ref, **scratch: Ref) -> None:
        query, key, value, out_gradient, stats, limits, query_gradient = arrays
        memory = types.SimpleNamespace(**scratch)
        # Causal: the last query tiles see the most keys and come first.
        rank, sequence = _divided(lax.axis_index("block"), sequences)
        tile = query_tiles - 1 - rank if problem.causal else rank
        batch, head = _divided(sequence, problem.num_heads)
        kv_head = lax.div(head, jnp.int32(problem.group))
        owned = pl.ds(tile * TILE, TILE)
        limit = limits[batch]
        end = jnp.minimum(limit, (tile + 1) * TILE) if problem.causal else limit
        num_steps = jnp.maximum(lax.div(end + (TILE - 1), jnp.int32(TILE)), 1)

        def load() -> None:
            plgpu.copy_gmem_to_smem(
                query.at[batch, owned, head], memory.queries, memory.queries_full
            )
            plgpu.copy_gmem_to_smem(
                out_gradient.at[batch, owned, head], memory.gradients, memory.queries_full
            )
            plgpu.copy_gmem_to_smem(stats.at[batch, head, :, owned], memory.rows, memory.rows_full)

            @pl.loop(0, num_steps)
            def _step(step: Ref) -> None:
                there = pl.ds(step * TILE, TILE)
                slot = lax.rem(step, jnp.int32(stages))
                value_slot = lax.rem(step, jnp.int32(value_stages))

                @pl.when(step >= stages)
                def _wait_keys() -> None:
                    plgpu.barrier_wait(memory.keys_free.at[slot])

                plgpu.copy_gmem_to_smem(
                    key.at[batch, there, kv_head], memory.keys.at[slot], memory.keys_full.at[slot]
                )

                @pl.when(step >= value_stages)
                def _wait_values() -> None:
                    plgpu.barrier_wait(memory.values_free.at[value_slot])

                plgpu.copy_gmem_to_smem(
                    value.at[batch, there, kv_head],
                    memory.values.at[value_slot],
                    memory.values_full.at[value_slot],
                )

            @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
            def _drain_keys(step: Ref) -> None:
                plgpu.barrier_wait(memory.keys_free.at[lax.rem(step, jnp.int32(stages))])

            @pl.loop(jnp.maximum(num_steps - value_stages, 0), num_steps)
            def _drain_values(step: Ref) -> None:
                plgpu.barrier_wait(memory.values_free.at[lax.rem(step, jnp.int32(value_stages))])

        def multiply() -> None:
            def score(step: Ref, slot: Ref) -> None:
                value_slot = lax.rem(step, jnp.int32(value_stages))
                plgpu.barrier_wait(memory.keys_full.at[slot])
                plgpu.tcgen05_mma(
                    memory.scores,
                    memory.queries,
                    memory.keys.at[slot].transpose((1, 0)),
                    accumulate=False,
                )
                plgpu.barrier_wait(memory.values_full.at[value_slot])
                plgpu.tcgen05_mma(
                    memory.slopes,
                    memory.gradients,
                    memory.values.at[value_slot].transpose((1, 0)),
                    accumulate=False,
                )
                plgpu.tcgen05_commit_arrive(memory.tiles_full)
                plgpu.tcgen05_commit_arrive(memory.values_free.at[value_slot])

            def product(step: Ref, slot: Ref) -> None:
                # A barrier a place: the next step's slopes may be ready before this looks.
                place = lax.rem(step, jnp.int32(2))
                plgpu.barrier_wait(memory.slopes_ready.at[place])
                plgpu.tcgen05_mma(
                    memory.query_total,
                    memory.slope_weights.at[:, pl.ds(place * TILE, TILE)],
                    memory.keys.at[slot],
                    accumulate=step > 0,
                )
                plgpu.tcgen05_commit_arrive(memory.keys_free.at[slot])

            def step_body(step: Ref, slot: Ref) -> Ref:
                after = jnp.where(slot == stages - 1, 0, slot + 1)
                plgpu.barrier_wait(memory.tiles_free)
                score(step + 1, after)
                product(step, slot)
                return after

            plgpu.barrier_wait(memory.queries_full)
            score(jnp.int32(0), jnp.int32(0))
            slot = lax.fori_loop(0, num_steps - 1, step_body, jnp.int32(0))
            plgpu.barrier_wait(memory.tiles_free)
            product(num_steps - 1, slot)
            plgpu.tcgen05_commit_arrive(memory.all_done)

        def compute(warpgroup: Ref) -> None:
            here = warpgroup * HALF
            plgpu.barrier_wait(memory.rows_full)
            lse = plgpu.load(memory.rows.at[0], layout=TMEM_ROW_LAYOUT)
            delta = plgpu.load(memory.rows.at[1], layout=TMEM_ROW_LAYOUT)

            def step_body(step: Ref, masked: bool) -> None:
                plgpu.barrier_wait(memory.tiles_full)
                part = plgpu.async_load_tmem(_columns(memory.scores, here), layout=TMEM_LAYOUT)
                slope = plgpu.async_load_tmem(_columns(memory.slopes, here), layout=TMEM_LAYOUT)
                wait_tmem_loads(interpret=problem.interpreted)
                plgpu.barrier_arrive(memory.tiles_free)
                part = part * jnp.float32(problem.scale * LOG2_E)
                part = jnp.exp2(part - lax.broadcast_in_dim(lse, part.shape, [0]))
                if masked:
                    slots = step * TILE + here
                    slots = slots + plgpu.broadcasted_iota(
                        jnp.int32, part.shape, 1, layout=TMEM_LAYOUT
                    )
                    seen = slots < limit
                    if problem.causal:
                        tokens = tile * TILE + plgpu.broadcasted_iota(
                            jnp.int32, part.shape, 0, layout=TMEM_LAYOUT
                        )
                        seen = seen & (slots <= tokens)
                    part = jnp.where(seen, part, 0.0)
                slope = part * (slope - lax.broadcast_in_dim(delta, part.shape, [0]))
                # The product that read this place two steps ago ended before the tiles were full.
                place = lax.rem(step, jnp.int32(2))
                target = _columns(memory.slope_weights, place * TILE + here)
                plgpu.async_store_tmem(target, slope.astype(problem.dtype))
                wait_tmem_stores(interpret=problem.interpreted)
                plgpu.barrier_arrive(memory.slopes_ready.at[place])

            # Only the last tile can hold keys that are not seen: past the limit or the diagonal.
            lax.fori_loop(0, num_steps - 1, lambda step, _: step_body(step, False), None)
            step_body(num_steps - 1, True)
            plgpu.barrier_wait(memory.all_done)

            @pl.when(warpgroup == 0)
            def _write() -> None:
                there = query_gradient.at[batch, owned, head]
                _store(memory.query_total, problem.scale, memory.queries, there)

        _run_roles(compute, load, multiply)

    scratch = {
        "queries": problem.smem(),
        "gradients": problem.smem(),
        "keys": problem.smem(stages),
        "values": problem.smem(value_stages),
        "rows": plgpu.SMEM((2, TILE), jnp.float32),
        "scores": problem.scores(),
        "slopes": problem.scores(),
        "slope_weights": plgpu.TMEM((TILE, 2 * TILE), problem.dtype, packed=True),
        "query_total": problem.total(),
        "queries_full": plgpu.Barrier(num_arrivals=2),
        "rows_full": plgpu.Barrier(),
        "keys_full": plgpu.Barrier(num_barriers=stages),
        "values_full": plgpu.Barrier(num_barriers=value_stages),
        "keys_free": _tensor_barrier(count=stages),
        "values_free": _tensor_barrier(count=value_stages),
        "tiles_full": _tensor_barrier(),
        "tiles_free": _tensor_barrier(2),
        "slopes_ready": _tensor_barrier(2, count=2),
        "all_done": _tensor_barrier(),
    }
    shape = (problem.batch, problem.num_tokens, problem.num_heads, problem.head_dim)
    output = jax.ShapeDtypeStruct(shape, problem.dtype)
    return problem.launch(
        "attention_query_gradient", body, output, scratch, query_tiles * sequences
    )
