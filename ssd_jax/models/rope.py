"""Rotary position embeddings in the rotate-half layout of Hugging Face checkpoints.

Source: Su et al. 2021; the frequency scaling of Llama 3.1 as its published `config.json` defines
it.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssd_jax.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each of the head_dim / 2 rotated pairs, float32 [H/2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    # Pairs that turn often within the original context stay, those that hardly turn are slowed by
    # `factor`; `keep` goes from 0 to 1 in between.
    turns = scaling.original_max_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rope_angles(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Cosines and sines for each position, float32, each frequency twice (rotate-half layout).

    Positions are multiplied in float32: bfloat16 could not tell positions above 256 apart.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    heads: Float[Array, "B T K G H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]
) -> Float[Array, "B T K G H"]:
    """Heads rotated by their positions' angles; float32 inside, returned in their own dtype."""
    x = heads.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos[:, :, None, None, :], sin[:, :, None, None, :]
    return (x * cos + rotated * sin).astype(heads.dtype)
