"""Merging attention over parts of the keys into attention over all of them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def combine(
    outs: Float[Array, "... C M H"],
    lses: Float[Array, "... C M"],
    computed: Bool[Array, "... C M"],
) -> tuple[Float[Array, "... M H"], Float[Array, "... M"]]:
    """The attended values over all parts, and their LSE (base 2), float32.

    Each part comes normalised, with its LSE (base 2). Parts that are not computed may hold
    anything, NaN included. A row that sees nothing in any part gets zeros and minus infinity, one
    with a NaN in a part that is computed gets NaN.
    """
    lses = jnp.where(computed, lses, -jnp.inf)
    top = jnp.max(lses, axis=-2, keepdims=True)
    top = jnp.where(top == -jnp.inf, jnp.float32(0), top)
    shares = jnp.exp2(lses - top)
    total = jnp.sum(shares, axis=-2, keepdims=True)
    shares = shares / jnp.where(total == 0, jnp.float32(1), total)
    parts = jnp.where((shares != 0)[..., None], outs * shares[..., None], jnp.float32(0))
    return jnp.sum(parts, axis=-3), (jnp.log2(total) + top)[..., 0, :]
