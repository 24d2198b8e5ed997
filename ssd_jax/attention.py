"""Attention as the decoder calls it: the only module that talks to `pallas_kernels`."""

from jaxtyping import Array, Float, Int

import pallas_kernels


def attend(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    """Causal attention of T new tokens over a cache that already holds their keys and values.

    Token t of row b sits in slot start[b] + t and sees the slots up to its own.
    """
    return pallas_kernels.cached_attention(query, keys, values, start)
