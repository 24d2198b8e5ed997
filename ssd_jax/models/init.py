"""Parameter trees without a checkpoint: shapes alone, or random weights for benchmarks."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from ssd_jax.config import ModelConfig
from ssd_jax.types import LayerParams, ModelParams


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> ModelParams:
    """The parameter tree of a configuration as shapes, nothing allocated."""

    def leaf(*shape: int) -> Any:  # noqa: ANN401 - a shape where the tree wants an array
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    k, g = config.num_kv_heads, config.queries_per_kv
    layer = LayerParams(
        attention_norm=leaf(d),
        qkv=leaf(d, k, g + 2, h),
        qkv_bias=leaf(k, g + 2, h) if config.qkv_bias else None,
        query_norm=leaf(h) if config.qk_norm else None,
        key_norm=leaf(h) if config.qk_norm else None,
        output=leaf(k, g, h, d),
        output_bias=leaf(d) if config.output_bias else None,
        mlp_norm=leaf(d),
        gate_up=leaf(d, 2, f),
        gate_up_bias=leaf(2, f) if config.mlp_bias else None,
        down=leaf(f, d),
        down_bias=leaf(d) if config.mlp_bias else None,
    )
    return ModelParams(
        embedding=leaf(config.vocab_size, d),
        layers=(layer,) * config.num_layers,
        final_norm=leaf(d),
        lm_head=None if config.tied_embeddings else leaf(d, config.vocab_size),
    )


def random_params(config: ModelConfig, seed: int, dtype: DTypeLike) -> ModelParams:
    """Random weights: norms 1, biases 0, matrices normal with a deviation of 0.02 (as GPT-2 does).

    The projections back into the residual stream are smaller by sqrt(2 L), so that the stream's
    size does not grow with depth.
    """
    residual_deviation = 0.02 * (2 * config.num_layers) ** -0.5
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    leaves = []
    for index, (path, leaf) in enumerate(paths):
        name = path[-1].name
        if name.endswith("norm"):
            leaves.append(jnp.ones(leaf.shape, leaf.dtype))
        elif name.endswith("bias"):
            leaves.append(jnp.zeros(leaf.shape, leaf.dtype))
        else:
            deviation = residual_deviation if name in ("output", "down") else 0.02
            key = jax.random.fold_in(jax.random.key(seed), index)
            noise = deviation * jax.random.normal(key, leaf.shape, jnp.float32)
            leaves.append(noise.astype(leaf.dtype))
    return jax.tree.unflatten(tree, leaves)
