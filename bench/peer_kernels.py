"""Attention kernels of other libraries as cases for ahead-of-time compilation.

tokamax is installed into the compiling environment only (`uv pip install --python
.venv-aot/bin/python tokamax==0.0.17`); it asks the device it sees for its chip, so its
configuration is given here.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _shapes(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> tuple[jax.ShapeDtypeStruct, ...]:
    kind = jnp.dtype(dtype)
    query = jax.ShapeDtypeStruct((batch, length, heads, head_dim), kind)
    keys = jax.ShapeDtypeStruct((batch, length, kv_heads, head_dim), kind)
    return query, keys, keys


def _tokamax(module: str) -> Any:  # noqa: ANN401
    """One of tokamax's modules, which is in the compiling environment only."""
    return importlib.import_module(f"tokamax._src.ops.attention.{module}")


def jax_hopper_forward(
    *,
    batch: int = 1,
    length: int = 8192,
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 128,
    causal: bool = False,
    block_kv: int = 128,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """JAX's own Hopper forward (`attention_mgpu`), float16 only."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=causal
    )
    return (
        lambda q, k, v: attention_mgpu.attention(q, k, v, config),
        _shapes(batch, length, heads, kv_heads, head_dim, "float16"),
    )


def tokamax_forward(
    *,
    chip: str,
    batch: int = 1,
    length: int = 8192,
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    causal: bool = False,
    collective: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The forward of tokamax for "sm100" (one or two blocks a tensor core) or "sm90"."""
    sm90, sm100 = (_tokamax(f"pallas_mosaic_gpu_kernel_{name}") for name in ("sm90", "sm100"))

    if chip == "sm100":
        kernel = sm100.flash_attention_kernel
        block_q = 256 if collective else 128  # of a pair of blocks, of one
        config = sm100.Config(block_q=block_q, block_kv=128, num_stages=2, collective=collective)
    else:
        kernel = sm90.flash_attention_kernel
        config = sm90.Config(block_q=64, block_kv=128, num_stages=2)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:  # noqa: ANN401
        return jax.vmap(
            lambda q, k, v: kernel(
                q,
                k,
                v,
                bias=None,
                mask=None,
                k_start=None,
                k_end=None,
                is_causal=causal,
                logits_soft_cap=None,
                logits_scale=head_dim**-0.5,
                out_dtype=jnp.dtype(dtype),
                normalize_output=True,
                return_residuals=False,
                use_stable_softmax=True,
                rescale_threshold=1.0,
                config=config,
            )
        )(q, k, v)

    return forward, _shapes(batch, length, heads, kv_heads, head_dim, dtype)


def tokamax_backward(
    *,
    batch: int = 1,
    length: int = 8192,
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    causal: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradients of tokamax for Blackwell: a kernel for the query, one for keys and values."""
    module = _tokamax("pallas_mosaic_gpu_vjp_kernel_sm100")
    config = module.Config(
        block_q_dkv=128, block_kv_dkv=128, block_q_dq=128, block_kv_dq=128, compute_wgs=1
    )

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, m: jax.Array, l: jax.Array) -> Any:  # noqa: ANN401
        return jax.vmap(
            lambda q, k, v, m, l: module.flash_attention_vjp_kernel(
                q,
                k,
                v,
                (m, l),
                q,
                q,
                None,
                None,
                None,
                None,
                logits_scale=head_dim**-0.5,
                logits_soft_cap=None,
                is_causal=causal,
                ds_dtype=None,
                config=config,
            )[:3]
        )(q, k, v, m, l)

    row = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    return backward, (*_shapes(batch, length, heads, kv_heads, head_dim, dtype), row, row)
