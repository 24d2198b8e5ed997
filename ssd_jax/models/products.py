"""Products of activations and weights, in the form that XLA computes fastest."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from ssd_jax.cpu_clients import computes_on_one_thread

_ROWS_AT_ONCE = 8  # rows of weights one pass adds up; more need more registers than there are
_LONG_ROW = 4096  # outputs that make a pass long enough for the memory to keep up
_MOST_TOKENS = {"float32": 8, "bfloat16": 2}
_CACHED_WEIGHTS = 2**20  # smaller matrices stay in a core's cache, where XLA's own product is good


def project(
    x: Float[Array, "B T I"],
    weights: Float[Array, "I *O"],
    bias: Float[Array, "*O"] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B T *O"]:
    """Sum over the last axis of x and the first of the weights, + bias, in x's dtype unless told.

    Sums are float32. For few tokens XLA's CPU backend rearranges all weights at every product,
    and reads bfloat16 ones at half the memory's speed. Where it has one thread, weights are added
    up row by row instead, which it compiles to a plain loop at that speed (1.1 to 1.8 times
    faster). Such a loop stays on its thread, so with several the product is faster.
    """
    dtype = x.dtype if dtype is None else dtype
    if _pays_by_rows(x, weights) and computes_on_one_thread():
        y = jax.lax.platform_dependent(
            x,
            weights,
            cpu=lambda x, weights: _add_rows(x, weights).astype(dtype),
            default=lambda x, weights: multiply(x, weights, dtype),
        )
    else:
        y = multiply(x, weights, dtype)
    return y if bias is None else y + bias


def multiply(
    x: Float[Array, "B T I"], weights: Float[Array, "I *O"], dtype: DTypeLike
) -> Float[Array, "B T *O"]:
    """The product as XLA's own, in the given dtype; for weights that lie transposed, too.

    A single bfloat16 row is computed as two equal ones: XLA's CPU backend converts the whole weight
    matrix to float32 for a one-row product (2.3 times slower), and its GPU backend may write all
    single products to memory before it adds them up.
    """
    one_row = x.dtype == jnp.bfloat16 and x.shape[0] * x.shape[1] == 1
    rows = jnp.concatenate([x, x], axis=1) if one_row else x
    y = jnp.tensordot(rows, weights, axes=1, preferred_element_type=dtype)
    return y[:, :1] if one_row else y


def _pays_by_rows(x: Float[Array, "B T I"], weights: Float[Array, "I *O"]) -> bool:
    num_tokens = x.shape[0] * x.shape[1]
    if x.dtype != weights.dtype or x.shape[2] % _ROWS_AT_ONCE:
        return False
    if x.dtype == jnp.bfloat16 and num_tokens == 1:
        return True
    few = num_tokens <= _MOST_TOKENS.get(x.dtype.name, 0)
    return few and weights.size > _CACHED_WEIGHTS


def _add_rows(x: Float[Array, "B T I"], weights: Float[Array, "I *O"]) -> Float[Array, "B T *O"]:
    """The product in float32 as a sum of weight rows, each times one number a token."""
    width, outputs = x.shape[2], math.prod(weights.shape[1:])
    # Rows that are short for a memory page are taken side by side, and summed in the end.
    beside = math.gcd(
        width // _ROWS_AT_ONCE, 2 ** math.ceil(math.log2(max(1, _LONG_ROW / outputs)))
    )
    rows = x.reshape(-1, width // beside, beside, 1).astype(jnp.float32)
    weights_3d = weights.reshape(width // beside, beside, outputs)

    def add(step: Array, total: Float[Array, "M G O"]) -> Float[Array, "M G O"]:
        first = step * _ROWS_AT_ONCE
        # One slice a row: XLA reads it in place, while it would copy a slice of several rows.
        for i in range(_ROWS_AT_ONCE):
            factor = jax.lax.dynamic_index_in_dim(rows, first + i, axis=1, keepdims=False)
            row = jax.lax.dynamic_index_in_dim(weights_3d, first + i, axis=0, keepdims=False)
            total = total + factor * row.astype(jnp.float32)
        return total

    nothing = jnp.zeros((rows.shape[0], beside, outputs), jnp.float32)
    total = jax.lax.fori_loop(0, rows.shape[1] // _ROWS_AT_ONCE, add, nothing)
    return jnp.sum(total, axis=1).reshape(*x.shape[:2], *weights.shape[1:])
