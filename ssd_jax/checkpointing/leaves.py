"""Parameter trees as flat tables: dotted leaf name, such as `layers.3.qkv`, to array or shape."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ssd_jax.config import ModelConfig
from ssd_jax.errors import CheckpointError
from ssd_jax.models.init import abstract_params
from ssd_jax.types import ModelParams

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(jnp.bfloat16)


def weight_dtype(dtype: DTypeLike) -> np.dtype:
    """The numpy dtype that weights are kept in.

    Raises:
        CheckpointError: anything but float32 and bfloat16.
    """
    try:
        resolved = np.dtype(jnp.dtype(dtype))
        if resolved in (FLOAT32, BFLOAT16):
            return resolved
    except TypeError:
        pass
    raise CheckpointError(
        f"Expected the dtype float32 or bfloat16, got {dtype}; choose one of them."
    )


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of a model, by name, in the order of the tree."""
    shapes = leaves_of(abstract_params(config, FLOAT32))
    return {name: tuple(leaf.shape) for name, leaf in shapes.items()}


def leaves_of(params: ModelParams) -> dict[str, Any]:
    """Every leaf of a parameter tree, by name, in the order of the tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def params_from_leaves(config: ModelConfig, leaves: Mapping[str, Any]) -> ModelParams:
    """The parameter tree whose leaves are given by name; every name must be there."""
    abstract = abstract_params(config, FLOAT32)
    values = [leaves[name] for name in leaves_of(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)
