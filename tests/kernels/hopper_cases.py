"""Cases of the Hopper forward kernel, to be run by `proof.interpret` and compiled ahead of time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from backward_cases import draw
from edges import relative_rms
from faults import without

from pallas_kernels.forward_sm90 import HopperConfig, _Kernel, attention
from pallas_kernels.proof import interpret


def accuracy(
    *,
    batch: int = 1,
    tokens: int = 128,
    slots: int = 256,
    heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    causal: bool = False,
    size: float = 1.0,
    lengths: list[int] | None = None,
    start: list[int] | None = None,
    scale: float | None = None,
    **config: Any,
) -> dict[str, float]:
    """Relative RMS error of the output and largest error of the LSE against float64."""
    query, key, value, _ = draw(batch, tokens, slots, heads, kv_heads, head_dim, dtype, size)
    scale = head_dim**-0.5 if scale is None else scale
    want, want_lse = float64_attention(query, key, value, lengths, start, causal, scale)
    if lengths is not None:
        unseen = np.arange(slots)[None, :, None, None] >= np.asarray(lengths)[:, None, None, None]
        key, value = (jnp.where(unseen, jnp.asarray(1e3, x.dtype), x) for x in (key, value))
    out, lse = attention(
        query,
        key,
        value,
        None if lengths is None else jnp.asarray(lengths, jnp.int32),
        None if start is None else jnp.asarray(start, jnp.int32),
        causal=causal,
        scale=scale,
        soft_cap=None,
        window=None,
        config=HopperConfig(**config),
        interpret=interpret.params(),
    )
    blind = np.isneginf(want_lse)
    lse = np.asarray(lse, np.float64)
    return {
        "relative_rms": relative_rms(np.asarray(out, np.float64), want),
        "lse": float(np.max(np.abs(lse[~blind] - want_lse[~blind]))),
        "blind_rows_right": bool(np.all(np.isneginf(lse) == blind)),
    }


def wrong(figures: dict[str, float], case: dict[str, Any]) -> list[str]:
    """Which figures of `accuracy` are not those of a right kernel."""
    rms = {"bfloat16": 3e-3, "float16": 4e-4}[case.get("dtype", "bfloat16")]
    limits = {"relative_rms": rms, "lse": 2e-4}
    too_large = [name for name, limit in limits.items() if not figures[name] <= limit]
    return too_large + ([] if figures["blind_rows_right"] else ["blind_rows_right"])


def float64_attention(
    query: Any,
    key: Any,
    value: Any,
    lengths: list[int] | None,
    start: list[int] | None,
    causal: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and natural LSE of the plain formula in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) * scale
    slots = np.arange(key.shape[1])
    seen = np.ones((query.shape[0], query.shape[1], key.shape[1]), bool)
    if causal:
        first = np.zeros(query.shape[0], int) if start is None else np.asarray(start)
        seen &= slots <= (first[:, None] + np.arange(query.shape[1]))[:, :, None]
    if lengths is not None:
        seen &= slots < np.asarray(lengths)[:, None, None]
    scores = np.where(seen[:, None], scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    lse = np.where(total[..., 0] == 0, -np.inf, lse)
    return np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), value), lse


def compiled(
    *,
    batch: int = 1,
    length: int = 8192,
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    causal: bool = False,
    **config: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The forward kernel as a case for ahead-of-time compilation."""
    kind = jnp.dtype(dtype)
    query = jax.ShapeDtypeStruct((batch, length, heads, head_dim), kind)
    key = jax.ShapeDtypeStruct((batch, length, kv_heads, head_dim), kind)

    def run(query: Any, key: Any, value: Any) -> Any:
        return attention(
            query,
            key,
            value,
            None,
            None,
            causal=causal,
            scale=head_dim**-0.5,
            soft_cap=None,
            window=None,
            config=HopperConfig(**config),
        )

    return run, (query, key, key)


def faulty(*, fault: str) -> dict[str, float]:
    """The kernel without one piece of its synchronisation, on enough blocks to need it."""
    with without(fault, _Kernel):
        return accuracy(slots=512, head_dim=64)
