"""`combine` for the splits of a cache on a GPU: reads those that exist, not all that could.

A cache of 128k slots that holds 2k tokens has 128 splits, of which the decode kernels compute two;
XLA would read all 128 to leave out 126. Here a warpgroup merges a row, or two of head dim 64, in a
loop over the row's own splits, a few at once so that their loads overlap. A split that does not
exist adds exactly nothing, so that a row depends on neither its batch nor the cache's size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import Ref

_THREADS = 128  # each has one element
_AT_ONCE = 8  # splits


def combine_splits(
    outs: Float[Array, "B K C M H"],
    lses: Float[Array, "B K C M"],
    num_splits: Int[Array, "B"],
    *,
    interpret: Any = False,  # noqa: ANN401
) -> tuple[Float[Array, "B K M H"], Float[Array, "B K M"]]:
    """What `combine` returns if splits 0 .. num_splits[b] - 1 of row b are computed, float32.

    H divides 128, and M is a multiple of 128 / H.
    """
    batch, num_kv_heads, _, num_rows, head_dim = outs.shape
    together = _THREADS // head_dim  # rows that one warpgroup merges
    shape = (batch, num_kv_heads, num_rows // together)
    kernel = plgpu.kernel(
        functools.partial(_merge, num_kv_heads, together),
        out_type=(
            jax.ShapeDtypeStruct((*shape, _THREADS), jnp.float32),
            jax.ShapeDtypeStruct((*shape, together), jnp.float32),
        ),
        grid=(shape[2], batch * num_kv_heads),
        grid_names=("rows", "head"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="attention_combine_splits",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )
    outs = outs.reshape(*outs.shape[:3], shape[2], _THREADS)
    lses = lses.reshape(*lses.shape[:3], shape[2], together)
    out, lse = kernel(outs, lses, num_splits.astype(jnp.int32))
    return out.reshape(*shape[:2], num_rows, head_dim), lse.reshape(*shape[:2], num_rows)


def _merge(
    num_kv_heads: int,
    together: int,
    outs: Ref,
    lses: Ref,
    num_splits: Ref,
    out_gmem: Ref,
    lse_gmem: Ref,
) -> None:
    """One warpgroup's rows over all their splits, by the online softmax."""
    index, rows = lax.axis_index("head"), lax.axis_index("rows")
    batch, head = lax.div(index, num_kv_heads), lax.rem(index, num_kv_heads)
    number = num_splits[batch]
    layout = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)
    thread = plgpu.broadcasted_iota(jnp.int32, (_THREADS,), 0, layout=layout)

    def spread(of_rows: list[Ref]) -> Ref:
        """One number a row as one number a thread."""
        spread = plgpu.layout_cast(jnp.broadcast_to(of_rows[0], (_THREADS,)), layout)
        for row in range(1, together):
            is_before = thread < row * (_THREADS // together)
            spread = jnp.where(is_before, spread, of_rows[row])
        return spread

    def add(step: Ref, carry: tuple[Ref, list[Ref], list[Ref]]) -> tuple[Ref, list[Ref], list[Ref]]:
        out, tops, totals = carry
        splits = [step * _AT_ONCE + i for i in range(_AT_ONCE)]
        reads = [lax.min(split, number - 1) for split in splits]
        parts = [
            plgpu.load(outs.at[batch, head, split, rows], layout=layout, optimized=False)
            for split in reads
        ]
        factors, weights = [], []
        for row in range(together):
            found = [
                jnp.where(split < number, lses[batch, head, read, rows, row], -jnp.inf)
                for split, read in zip(splits, reads, strict=True)
            ]
            top = functools.reduce(jnp.maximum, found, tops[row])
            # A row that has seen nothing yet keeps a top of minus infinity, and weights of zero.
            base = jnp.where(top == -jnp.inf, jnp.float32(0), top)
            factors.append(jnp.exp2(tops[row] - base))
            weights.append([jnp.exp2(lse - base) for lse in found])
            totals[row] = functools.reduce(jnp.add, weights[row], totals[row] * factors[row])
            tops[row] = top
        out = out * spread(factors)
        for part, *of_rows in zip(parts, *weights, strict=True):
            weight = spread(of_rows)
            out = out + jnp.where(weight != 0, part * weight, jnp.float32(0))
        return out, tops, totals

    nothing = plgpu.layout_cast(jnp.zeros((_THREADS,), jnp.float32), layout)
    carry = (nothing, [jnp.float32(-jnp.inf)] * together, [jnp.float32(0)] * together)
    steps = lax.div(number + _AT_ONCE - 1, _AT_ONCE)
    out, tops, totals = lax.fori_loop(0, steps, add, carry)
    safe = [jnp.where(total == 0, jnp.float32(1), total) for total in totals]  # not NaN
    out_gmem[batch, head, rows] = out / spread(safe)
    for row in range(together):
        lse_gmem[batch, head, rows, row] = jnp.where(
            totals[row] == 0, -jnp.inf, tops[row] + jnp.log2(safe[row])
        )
