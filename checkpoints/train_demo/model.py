"""Training-time forward pass: the decoder's own blocks, without a cache, and the two losses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssd_jax.config import ModelConfig
from ssd_jax.models.decoder import compute_logits, mlp_block, project, project_qkv, rms_norm
from ssd_jax.models.rope import rope_angles
from ssd_jax.types import ModelParams


def training_logits(
    config: ModelConfig, params: ModelParams, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Next-token logits at every position of whole sequences that start at position 0, float32.

    The decoder's blocks around a plain causal attention in the parameters' own dtype, laid out with
    heads before tokens: the layout in which XLA's CPU backend keeps its fast matrix products, also
    in the backward pass.
    """
    batch, num_tokens = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), tokens.shape)
    cos, sin = rope_angles(config, positions)
    causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    x = params.embedding[tokens]
    for layer in params.layers:
        query, key, value = project_qkv(config, layer, x, cos, sin)
        grouped = query.reshape(
            batch, num_tokens, config.num_kv_heads, config.queries_per_kv, config.head_dim
        )
        query = grouped.transpose(0, 2, 3, 1, 4)
        key = jnp.broadcast_to(key.transpose(0, 2, 1, 3)[:, :, None], query.shape)
        value = jnp.broadcast_to(value.transpose(0, 2, 1, 3)[:, :, None], query.shape)
        scores = jnp.einsum("bkgth,bkgsh->bkgts", query, key).astype(jnp.float32)
        scores = jnp.where(causal, scores * jnp.float32(config.head_dim**-0.5), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        attended = jnp.einsum("bkgts,bkgsh->bkgth", weights, value).transpose(0, 3, 1, 2, 4)
        x = x + project("btkgh,kghd->btd", attended, layer.output, layer.output_bias)
        x = x + mlp_block(config, layer, x)
    x = rms_norm(x, params.final_norm, config.rms_norm_eps)
    return compute_logits(params, x)


def next_token_loss(
    config: ModelConfig, params: ModelParams, windows: Int[Array, "B T+1"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each window's next tokens, in nats a token."""
    logits = training_logits(config, params, windows[:, :-1])
    picked = jnp.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def distillation_loss(
    config: ModelConfig,
    params: ModelParams,
    teacher_logits: Float[Array, "B T V"],
    windows: Int[Array, "B T+1"],
) -> Float[Array, ""]:
    """Mean KL divergence from teacher to student over all positions, in nats a token."""
    student = jax.nn.log_softmax(training_logits(config, params, windows[:, :-1]), axis=-1)
    teacher = jax.nn.log_softmax(teacher_logits, axis=-1)
    return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))
