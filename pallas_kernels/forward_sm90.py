"""Attention of whole prompts on Hopper: two warpgroups multiply and take the softmax, one loads.

A block owns 128 queries of one head, 64 a warpgroup. While the tensor core computes the values of
one block of keys, the same warpgroup takes the softmax of the next block's scores, which it
started before: P(j-1) V(j-1) runs behind S(j) = Q K(j)^T.

Source: FlashAttention-3 (Shah et al. 2024), section 3.2, the two-stage pipeline in a warpgroup.

JAX's interpreter lacks what the kernel needs of `wgmma`; `proof.wgmma` adds it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import Ref, tiled_smem
from pallas_kernels.exp2 import LOG2_E
from pallas_kernels.register_budgets import register_budgets
from pallas_kernels.registry import Kernel

TILE_ROWS = 64  # queries of a warpgroup
COMPUTE_WARPGROUPS = 2

_COMPUTE_REGISTERS, _, _LOAD_REGISTERS = register_budgets(240, 240, 24)
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_BLOCK_Q = TILE_ROWS * COMPUTE_WARPGROUPS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HopperConfig:
    """How the kernel is cut up.

    Args:
        block_kv: keys of one step.
        stages: blocks of keys, and of values, in shared memory.
    """

    block_kv: int = 128
    stages: int = 2

    def __post_init__(self) -> None:
        if self.block_kv % 64 or not 64 <= self.block_kv <= 256:
            raise ValueError(f"block_kv must be 64, 128, 192 or 256, got {self.block_kv}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")


type Shaped = jax.Array | jax.ShapeDtypeStruct


def unsupported(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    lengths: Shaped | None,
    start: Shaped | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> str | None:
    """Why the kernel cannot compute a call, or None; takes shapes."""
    del lengths, start, causal, scale
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return f"needs one dtype, bfloat16 or float16, for all arrays, got {sorted(dtypes)}"
    if query.shape[-1] not in (64, 128):
        return f"needs head dim 64 or 128, got {query.shape[-1]}"
    if soft_cap is not None or window is not None:
        return "has no soft cap and no sliding window"
    if not (query.shape[0] and query.shape[1] and key.shape[1]):
        return f"needs at least one token, got {query.shape} and {key.shape}"
    return None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: None,
    window: None,
    config: HopperConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The attended values and the natural LSE; see `reference.attention`.

    `interpret` goes to Pallas (interpreter parameters).
    """
    del soft_cap, window
    config = config or HopperConfig()
    batch, num_tokens, num_heads, head_dim = query.shape
    num_slots, num_kv_heads = key.shape[1], key.shape[2]
    query = _padded(query, _BLOCK_Q)
    key, value = _padded(key, config.block_kv), _padded(value, config.block_kv)
    num_tiles = query.shape[1] // _BLOCK_Q
    sequences = batch * num_heads
    limits = jnp.full((batch,), num_slots) if lengths is None else jnp.clip(lengths, 0, num_slots)
    starts = jnp.zeros((batch,)) if start is None else start
    bounds = jnp.stack([limits.astype(jnp.int32), starts.astype(jnp.int32)])
    kernel = _Kernel(
        num_tiles=num_tiles,
        num_heads=num_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        dtype=query.dtype,
        causal=causal,
        scale=scale,
        config=config,
    )
    out, lse = plgpu.kernel(
        kernel.body,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, query.shape[1]), jnp.float32),
        ),
        scratch_types=kernel.scratch(),
        grid=(num_tiles * sequences,),
        grid_names=("block",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_forward_sm90",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(query, key, value, bounds)
    return out[:, :num_tokens], lse[:, :, :num_tokens]


KERNELS = {"attention": Kernel(run=attention, unsupported=unsupported)}


def _padded(x: Array, multiple: int) -> Array:
    """With zeros up to a multiple along axis 1."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """One call's kernel: shapes of the padded arrays and options."""

    num_tiles: int
    num_heads: int
    group: int
    head_dim: int
    dtype: jax.typing.DTypeLike
    causal: bool
    scale: float
    config: HopperConfig

    def scratch(self) -> dict[str, Ref]:
        """Shared memory and barriers."""
        stages, block_kv = self.config.stages, self.config.block_kv

        def tile(*shape: int) -> Ref:
            return tiled_smem(shape, self.dtype)

        return {
            "queries": tile(COMPUTE_WARPGROUPS, TILE_ROWS, self.head_dim),
            "keys": tile(stages, block_kv, self.head_dim),
            "values": tile(stages, block_kv, self.head_dim),
            "sums": plgpu.SMEM((COMPUTE_WARPGROUPS, TILE_ROWS), jnp.float32),
            "queries_full": plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
            "keys_full": plgpu.Barrier(num_barriers=stages),
            "values_full": plgpu.Barrier(num_barriers=stages),
            "keys_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            "values_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        }

    def body(
        self,
        query: Ref,
        key: Ref,
        value: Ref,
        bounds: Ref,
        out: Ref,
        lse: Ref,
        **scratch: Ref,
    ) -> None:
        """What a block does."""
        # Causal: the last query tiles see the most keys and come first.
        sequences = jnp.int32(query.shape[0] * self.num_heads)
        rank = lax.div(lax.axis_index("block"), sequences)
        sequence = lax.rem(lax.axis_index("block"), sequences)
        tile = self.num_tiles - 1 - rank if self.causal else rank
        batch = lax.div(sequence, jnp.int32(self.num_heads))
        head = lax.rem(sequence, jnp.int32(self.num_heads))
        limit, first_position = bounds[0, batch], bounds[1, batch] + tile * _BLOCK_Q
        end, whole = limit, limit
        if self.causal:
            end = jnp.clip(first_position + _BLOCK_Q, 0, limit)
            whole = jnp.clip(first_position + 1, 0, limit)
        block_kv = jnp.int32(self.config.block_kv)
        place = _Place(
            batch=batch,
            head=head,
            tile=tile,
            limit=limit,
            first_position=first_position,
            num_steps=jnp.maximum(lax.div(end + (block_kv - 1), block_kv), 1),
            num_whole=jnp.maximum(lax.div(whole, block_kv), 1),
        )
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            self.compute(place, warpgroup, query, out, lse, **scratch)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _load() -> None:
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
            self.load(place, key, value, **scratch)

    def load(
        self,
        place: "_Place",
        key: Ref,
        value: Ref,
        *,
        keys: Ref,
        values: Ref,
        keys_full: Ref,
        values_full: Ref,
        keys_free: Ref,
        values_free: Ref,
        **_: Ref,
    ) -> None:
        """Brings blocks of keys and values in, as far ahead as there is room."""
        stages, block_kv = jnp.int32(self.config.stages), self.config.block_kv
        kv_head = lax.div(place.head, jnp.int32(self.group))

        @pl.loop(0, place.num_steps)
        def _step(step: Ref) -> None:
            slot = lax.rem(step, stages)
            there = (place.batch, pl.ds(step * block_kv, block_kv), kv_head)

            @pl.when(step >= stages)
            def _wait_keys() -> None:
                plgpu.barrier_wait(keys_free.at[slot])

            plgpu.copy_gmem_to_smem(key.at[there], keys.at[slot], keys_full.at[slot])

            @pl.when(step >= stages)
            def _wait_values() -> None:
                plgpu.barrier_wait(values_free.at[slot])

            plgpu.copy_gmem_to_smem(value.at[there], values.at[slot], values_full.at[slot])

        @pl.loop(jnp.maximum(place.num_steps - stages, 0), place.num_steps)
        def _drain(step: Ref) -> None:
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(keys_free.at[slot])
            plgpu.barrier_wait(values_free.at[slot])

    def compute(
        self,
        place: "_Place",
        warpgroup: Ref,
        query: Ref,
        out: Ref,
        lse: Ref,
        *,
        queries: Ref,
        keys: Ref,
        values: Ref,
        sums: Ref,
        queries_full: Ref,
        keys_full: Ref,
        values_full: Ref,
        keys_free: Ref,
        values_free: Ref,
    ) -> None:
        """64 queries against all their keys."""
        stages, block_kv = jnp.int32(self.config.stages), self.config.block_kv
        queries, sums = queries.at[warpgroup], sums.at[warpgroup]
        own = pl.ds(place.tile * _BLOCK_Q + warpgroup * TILE_ROWS, TILE_ROWS)
        score_accumulator = plgpu.WGMMAAccumulatorRef((TILE_ROWS, block_kv), jnp.float32)
        out_accumulator = plgpu.WGMMAAccumulatorRef((TILE_ROWS, self.head_dim), jnp.float32)

        def start_scores(accumulator: Ref, step: Ref) -> None:
            plgpu.wgmma(accumulator, queries, keys.at[lax.rem(step, stages)].transpose((1, 0)))

        def start_values(accumulator: Ref, total: Ref, part: Ref, step: Ref) -> None:
            accumulator[...] = total
            plgpu.wgmma(accumulator, part, values.at[lax.rem(step, stages)])

        def finish_values(accumulator: Ref, step: Ref) -> Ref:
            found = plgpu.wgmma_accumulator_load(accumulator, wait_n=0)
            plgpu.barrier_arrive(values_free.at[lax.rem(step, stages)])
            return found

        def softmax(scores: Ref, step: Ref, largest: Ref, masked: bool) -> Ref:
            """Weights, their row sums, the new row maxima and the factor for older sums."""
            if masked:
                scores = jnp.where(self.seen(place, warpgroup, step), scores, -jnp.inf)
            factor = jnp.float32(self.scale * LOG2_E)
            new_largest = jnp.maximum(largest, scores.max(axis=1) * factor)
            base = new_largest
            if masked:
                base = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
            shrink = jnp.exp2(largest - base)
            found = jnp.exp2(scores * factor - lax.broadcast_in_dim(base, scores.shape, [0]))
            return found, found.sum(axis=1), new_largest, shrink

        def first_step(accumulator: Ref) -> Ref:
            start_scores(accumulator, jnp.int32(0))
            scores = plgpu.wgmma_accumulator_load(accumulator, wait_n=0)
            plgpu.barrier_arrive(keys_free.at[0])
            nothing = plgpu.layout_cast(jnp.full((TILE_ROWS,), -jnp.inf, jnp.float32), _ROWS)
            part, total, largest, _ = softmax(scores, jnp.int32(0), nothing, True)
            return part.astype(self.dtype), total, largest

        def step_body(step: Ref, carry: Ref, masked: bool) -> Ref:
            def overlapped(score_acc: Ref, out_acc: Ref) -> Ref:
                total, part, weight, largest = carry
                start_scores(score_acc, step)
                start_values(out_acc, total, part, step - 1)
                scores = plgpu.wgmma_accumulator_load(score_acc, wait_n=1)
                plgpu.barrier_arrive(keys_free.at[lax.rem(step, stages)])
                found, added, largest, shrink = softmax(scores, step, largest, masked)
                total = finish_values(out_acc, step - 1)
                total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
                return total, found.astype(self.dtype), weight * shrink + added, largest

            # Between the accumulator's zeros and the product must be no wait: the compiler then
            # lets the product start from nothing, and writes no zeros.
            plgpu.barrier_wait(keys_full.at[lax.rem(step, stages)])
            plgpu.barrier_wait(values_full.at[lax.rem(step - 1, stages)])
            return pl.run_scoped(overlapped, score_accumulator, out_accumulator)

        plgpu.copy_gmem_to_smem(
            query.at[place.batch, own, place.head], queries, queries_full.at[warpgroup]
        )
        plgpu.barrier_wait(queries_full.at[warpgroup])
        plgpu.barrier_wait(keys_full.at[0])
        part, weight, largest = pl.run_scoped(first_step, score_accumulator)
        total = jnp.zeros((TILE_ROWS, self.head_dim), jnp.float32)
        carry = (plgpu.layout_cast(total, plgpu.Layout.WGMMA), part, weight, largest)
        carry = lax.fori_loop(1, place.num_whole, lambda i, c: step_body(i, c, False), carry)
        carry = lax.fori_loop(
            place.num_whole, place.num_steps, lambda i, c: step_body(i, c, True), carry
        )
        total, part, weight, largest = carry

        def last_values(accumulator: Ref) -> Ref:
            start_values(accumulator, total, part, place.num_steps - 1)
            return finish_values(accumulator, place.num_steps - 1)

        plgpu.barrier_wait(values_full.at[lax.rem(place.num_steps - 1, stages)])
        total = pl.run_scoped(last_values, out_accumulator)
        blind = weight == 0.0
        total = total * lax.broadcast_in_dim(jnp.where(blind, 0.0, 1.0 / weight), total.shape, [0])
        queries[...] = total.astype(self.dtype)
        found = (largest + jnp.log2(weight)) * jnp.float32(1 / LOG2_E)
        sums[...] = jnp.where(blind, -jnp.inf, found)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out.at[place.batch, own, place.head])
        plgpu.copy_smem_to_gmem(sums, lse.at[place.batch, place.head, own])
        plgpu.wait_smem_to_gmem(0)

    def seen(self, place: "_Place", warpgroup: Ref, step: Ref) -> Ref:
        """Which keys of a block the queries of a warpgroup may look at."""
        shape = (TILE_ROWS, self.config.block_kv)
        slots = step * self.config.block_kv + plgpu.broadcasted_iota(
            jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
        )
        seen = slots < place.limit
        if self.causal:
            first = place.first_position + warpgroup * TILE_ROWS
            positions = first + plgpu.broadcasted_iota(
                jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
            )
            seen = seen & (slots <= positions)
        return seen


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Which part of the work a block has, as traced scalars.

    Steps below `num_whole`, except step 0, need no mask.
    """

    batch: Ref
    head: Ref
    tile: Ref
    limit: Ref
    first_position: Ref
    num_steps: Ref
    num_whole: Ref
