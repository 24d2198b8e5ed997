"""One token in each of many branches that share a trunk: the decoder as tree drafting runs it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ssd_jax.attention import attend_branches
from ssd_jax.config import ModelConfig
from ssd_jax.models.decoder import mlp_block, project_output, project_qkv, rms_norm
from ssd_jax.models.rope import rope_angles
from ssd_jax.types import BranchCache, KVCache, ModelParams


def init_branches(
    config: ModelConfig, batch_size: int, draft_len: int, num_branches: int, dtype: DTypeLike
) -> BranchCache:
    """Room for `draft_len` tokens in each branch."""
    shape = (batch_size, config.num_kv_heads, draft_len, num_branches, config.head_dim)
    return BranchCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
    )


def forward_branches(
    config: ModelConfig,
    params: ModelParams,
    tokens: Int[Array, "B R"],
    trunk: KVCache,
    trunk_lengths: Int[Array, "B R"],
    branches: BranchCache,
    step: Int[Array, ""],
) -> tuple[Float[Array, "B R D"], BranchCache]:
    """Final hidden states of each branch's token of this step, and the branches with its keys.

    Branch r of row b continues the trunk's first trunk_lengths[b, r] tokens, so its token of step i
    has position trunk_lengths[b, r] + i. The trunk is only read.
    """
    cos, sin = rope_angles(config, trunk_lengths + step)
    x = params.embedding[tokens]
    all_keys, all_values = [], []
    layers = zip(
        params.layers, trunk.keys, trunk.values, branches.keys, branches.values, strict=True
    )
    for layer, trunk_keys, trunk_values, keys, values in layers:
        query, new_keys, new_values = project_qkv(config, layer, x, cos, sin)
        keys, values = _write(keys, new_keys, step), _write(values, new_values, step)
        attended = attend_branches(
            query, trunk_keys, trunk_values, trunk_lengths, keys, values, step
        )
        x = x + project_output(config, layer, attended)
        x = x + mlp_block(config, layer, x)
        all_keys.append(keys)
        all_values.append(values)
    hidden = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return hidden, BranchCache(keys=tuple(all_keys), values=tuple(all_values))


def _write(
    buffer: Float[Array, "B K J R H"], new: Float[Array, "B R K H"], step: Int[Array, ""]
) -> Float[Array, "B K J R H"]:
    """The buffer with every branch's new entry at this step."""
    new = new.swapaxes(1, 2)[:, :, None].astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, step, axis=2)
