"""Gradients of attention on Blackwell: one kernel for the query, one for keys and values.

Both recompute the weights from the LSE tile by tile, and both sum in tensor memory in a fixed
order: the result does not depend on which block finishes first (no atomics).

* dK/dV: a block owns 128 keys of one kv head and walks over the queries of all heads of its group.
  Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T lie in tensor
  memory as the left operands of dV += P^T dO and dK += dS^T Q.
* dQ: a block owns 128 queries of one head and walks over the keys: dQ += dS K.

Source: FlashAttention-2 (Dao 2023), section 3.1.2; the transposed products and their order follow
FlashAttention-4's backward pass (flash_attn/cute), its two-kernel form tokamax's.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backward_tiles_sm100 import (
    TILE,
    BackwardConfig,
    Problem,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from pallas_kernels.exp2 import LOG2_E
from pallas_kernels.reference import zero_past
from pallas_kernels.registry import Kernel

type Shaped = jax.Array | jax.ShapeDtypeStruct


def unsupported(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    lengths: Shaped | None,
    start: Shaped | None,
    out: Shaped,
    lse: Shaped,
    out_gradient: Shaped,
    lse_gradient: Shaped | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> str | None:
    """Why these kernels cannot compute the gradients of a call, or None; takes shapes."""
    del lengths, out, lse, lse_gradient, scale
    dtypes = {str(x.dtype) for x in (query, key, value, out_gradient)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return f"needs one dtype, bfloat16 or float16, for all arrays, got {sorted(dtypes)}"
    if query.shape[-1] not in (64, 128):
        return f"needs head dim 64 or 128, got {query.shape[-1]}"
    if start is not None:
        return "does not take start: tokens must begin at slot 0"
    if soft_cap is not None or window is not None:
        return "has no soft cap and no sliding window"
    if causal and query.shape[1] != key.shape[1]:
        return f"needs T = S when causal, got {query.shape[1]} and {key.shape[1]}"
    if not (query.shape[0] and query.shape[1] and key.shape[1]):
        return f"needs at least one token, got {query.shape} and {key.shape}"
    return None


def attention_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    out_gradient: Float[Array, "B T N H"],
    lse_gradient: Float[Array, "B N T"] | None,
    *,
    causal: bool,
    scale: float,
    soft_cap: None,
    window: None,
    config: BackwardConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of query, key and value; see `reference.attention_backward`.

    `lse` is the natural logarithm. `config` says how tensor memory is used, `interpret` goes to
    Pallas.
    """
    del start, soft_cap, window
    num_tokens, num_slots = query.shape[1], key.shape[1]
    stats = _row_statistics(out, lse, out_gradient, lse_gradient)
    query, out_gradient = _padded(query), _padded(out_gradient)
    # Padding weighs nothing, but nothing times a NaN, or times the infinity of a product, is NaN.
    key, value = (_padded(zero_past(x, lengths)) for x in (key, value))
    if lengths is None:
        limits = jnp.full((query.shape[0],), num_slots, jnp.int32)
    else:
        limits = jnp.minimum(lengths, num_slots).astype(jnp.int32)
    problem = Problem(
        batch=query.shape[0],
        num_tokens=query.shape[1],
        num_slots=key.shape[1],
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        dtype=query.dtype,
        causal=causal,
        scale=scale,
        config=config or BackwardConfig(),
        interpret=interpret,
    )
    arrays = (query, key, value, out_gradient, stats)
    query_gradient = query_gradient_kernel(problem)(*arrays, limits)
    key_gradient, value_gradient = key_value_gradient_kernel(problem)(*arrays)
    return (
        query_gradient[:, :num_tokens],
        zero_past(key_gradient[:, :num_slots], lengths),
        zero_past(value_gradient[:, :num_slots], lengths),
    )


KERNELS = {"attention_backward": Kernel(run=attention_backward, unsupported=unsupported)}


def _row_statistics(
    out: Array, lse: Array, out_gradient: Array, lse_gradient: Array | None
) -> Float[Array, "B N 2 T"]:
    """For every query its base-2 LSE and how much its total weight matters, padded to tiles.

    The LSE of a query that sees nothing becomes plus infinity: all its weights are then 0.
    """
    total = jnp.einsum(
        "btnh,btnh->bnt",
        out.astype(jnp.float32),
        out_gradient.astype(jnp.float32),
        precision="highest",
    )
    if lse_gradient is not None:
        total = total - lse_gradient
    blind = jnp.isneginf(lse)
    lse = jnp.where(blind, jnp.inf, lse * jnp.float32(LOG2_E))
    total = jnp.where(blind, jnp.float32(0), total)
    missing = ((0, 0), (0, 0), (0, -lse.shape[2] % TILE))
    lse = jnp.pad(lse, missing, constant_values=jnp.float32(jnp.inf))
    return jnp.stack([lse, jnp.pad(total, missing)], axis=2)


def _padded(x: Array) -> Array:
    """With zeros up to a whole number of tiles along axis 1."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, 0)))
