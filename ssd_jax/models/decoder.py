"""The one decoder of all families (Llama 3.x, Qwen2/2.5, dense Qwen3), as pure functions.

Layers are unrolled, not scanned: on a CPU a scan over stacked layers copies each layer's weights
out of the stack first, which halves decoding speed (`bench/decode_speed.py --scan` shows it).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssd_jax.attention import attend
from ssd_jax.config import ModelConfig
from ssd_jax.kv_cache import write_slots
from ssd_jax.models.products import multiply, project
from ssd_jax.models.rope import apply_rope, rope_angles
from ssd_jax.types import KVCache, LayerParams, ModelParams


def forward(
    config: ModelConfig,
    params: ModelParams,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    start: Int[Array, "*B"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Final hidden states (after the last norm) of T tokens a row, and the cache with their keys.

    Token t of row b has position start[b] + t (start may be one number for all rows) and is
    written to that slot; slots before it must hold the row's text. The cache's lengths are left
    alone: the caller knows how many tokens are real.
    """
    first = jnp.broadcast_to(start, tokens.shape[:1])
    positions = first[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    cos, sin = rope_angles(config, positions)
    x = params.embedding[tokens]
    all_keys, all_values = [], []
    for layer, keys, values in zip(params.layers, cache.keys, cache.values, strict=True):
        attended, keys, values = attention_block(config, layer, x, keys, values, start, cos, sin)
        x = x + attended
        x = x + mlp_block(config, layer, x)
        all_keys.append(keys)
        all_values.append(values)
    x = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return x, dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values))


def compute_logits(params: ModelParams, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Next-token logits of the given hidden states, float32."""
    if params.lm_head is None:
        return multiply(hidden, params.embedding.T, jnp.float32)
    return project(hidden, params.lm_head, dtype=jnp.float32)


def attention_block(
    config: ModelConfig,
    layer: LayerParams,
    x: Float[Array, "B T D"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    start: Int[Array, "*B"],
    cos: Float[Array, "B T H"],
    sin: Float[Array, "B T H"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """What attention adds to the residual stream, and this layer's updated keys and values."""
    query, new_keys, new_values = project_qkv(config, layer, x, cos, sin)
    keys = write_slots(keys, new_keys, start)
    values = write_slots(values, new_values, start)
    # Without the barrier XLA writes one-token updates twice, which costs copies of the whole cache.
    keys, values = jax.lax.optimization_barrier((keys, values))
    batch = x.shape[0]
    attended = attend(query, keys, values, jnp.broadcast_to(start, (batch,)))
    return project_output(config, layer, attended), keys, values


def project_qkv(
    config: ModelConfig,
    layer: LayerParams,
    x: Float[Array, "B T D"],
    cos: Float[Array, "B T H"],
    sin: Float[Array, "B T H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries and keys (normalised where the family does so, rotated) and values."""
    normed = rms_norm(x, layer.attention_norm, config.rms_norm_eps)
    fused = project(normed, layer.qkv, layer.qkv_bias)
    query, key, value = jnp.split(fused, [config.queries_per_kv, config.queries_per_kv + 1], axis=3)
    if layer.query_norm is not None and layer.key_norm is not None:
        query = rms_norm(query, layer.query_norm, config.rms_norm_eps)
        key = rms_norm(key, layer.key_norm, config.rms_norm_eps)
    query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    batch, num_tokens = x.shape[:2]
    query = query.reshape(batch, num_tokens, config.num_heads, config.head_dim)
    return query, *hide_failures(key[:, :, :, 0], value[:, :, :, 0])


def hide_failures(
    key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys and values as they are; numbers of a value that are not finite become 0, the key's NaN.

    Attention weighs the values of slots that it must not see (rejected drafts, padding) with 0, and
    0 times NaN is NaN. The score of a NaN key, however, is masked away unread, and reaches the
    queries that do see the slot all the same.
    """
    is_finite = jnp.isfinite(value)
    zero, nan = jnp.zeros((), value.dtype), jnp.full((), jnp.nan, key.dtype)
    return jnp.where(is_finite, key, nan), jnp.where(is_finite, value, zero)


def project_output(
    config: ModelConfig, layer: LayerParams, attended: Float[Array, "B T N H"]
) -> Float[Array, "B T D"]:
    """What the attended values add to the residual stream."""
    # Two dimensions only: over three contracted ones XLA rearranges the weights at every product.
    rows = attended.reshape(*attended.shape[:2], -1)
    weights = layer.output.reshape(-1, config.hidden_size)
    return project(rows, weights, layer.output_bias)


def mlp_block(
    config: ModelConfig, layer: LayerParams, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """What the gated feed-forward network adds to the residual stream."""
    normed = rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
    gate_up = project(normed, layer.gate_up, layer.gate_up_bias)
    gated = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
    return project(gated, layer.down, layer.down_bias)


def rms_norm(x: Float[Array, "*B C"], scale: Float[Array, "C"], eps: float) -> Float[Array, "*B C"]:
    """Rows of x over their root mean square, times scale; float32 inside."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale
