"""Cases of the Blackwell gradients, to be run by `proof.interpret` and compiled ahead of time."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from edges import relative_rms
from faults import without

from pallas_kernels import backward_sm100
from pallas_kernels.backward_sm100 import attention_backward
from pallas_kernels.backward_tiles_sm100 import BackwardConfig, Problem
from pallas_kernels.proof import interpret


def accuracy(
    *,
    batch: int = 1,
    tokens: int = 256,
    slots: int = 256,
    heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    causal: bool = False,
    size: float = 1.0,
    lengths: list[int] | None = None,
    lse_gradient: bool = False,
    scale: float | None = None,
    **config: Any,
) -> dict[str, float]:
    """Relative RMS errors of the three gradients against float64, and whether they repeat."""
    arrays = draw(batch, tokens, slots, heads, kv_heads, head_dim, dtype, size)
    query, key, value, out_gradient = arrays
    generator = np.random.default_rng(1)
    of_lse = generator.standard_normal((batch, heads, tokens)) if lse_gradient else None
    scale = head_dim**-0.5 if scale is None else scale
    out, lse, expected = float64_gradients(*arrays, of_lse, lengths, causal, scale)
    run = functools.partial(
        attention_backward,
        causal=causal,
        scale=scale,
        soft_cap=None,
        window=None,
        config=BackwardConfig(**config),
        interpret=interpret.params(),
    )
    if lengths is not None:
        # Padding holds large numbers: none of them may reach a gradient.
        unseen = np.arange(slots)[None, :, None, None] >= np.asarray(lengths)[:, None, None, None]
        key, value = (jnp.where(unseen, jnp.asarray(1e3, x.dtype), x) for x in (key, value))
    found = run(
        query,
        key,
        value,
        None if lengths is None else jnp.asarray(lengths, jnp.int32),
        None,
        jnp.asarray(out, jnp.dtype(dtype)),
        jnp.asarray(lse, jnp.float32),
        out_gradient,
        None if of_lse is None else jnp.asarray(of_lse, jnp.float32),
    )
    names = ("query", "key", "value")
    return {
        name: relative_rms(np.asarray(got, np.float64), want)
        for name, got, want in zip(names, found, expected, strict=True)
    }


def wrong(figures: dict[str, float], case: dict[str, Any]) -> list[str]:
    """Which figures of `accuracy` are not those of right kernels.

    Scores and weights pass through 16 bits before the products, out gradients came in 16 bits.
    """
    limit = {"bfloat16": 4e-3, "float16": 6e-4}[case.get("dtype", "bfloat16")]
    return [name for name, error in figures.items() if not error <= limit]


def draw(
    batch: int,
    tokens: int,
    slots: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    size: float,
) -> tuple[jax.Array, ...]:
    """Query, key, value and out gradient; `size` scales the query, and with it the scores."""
    generator = np.random.default_rng(0)
    of_queries, of_keys = (batch, tokens, heads, head_dim), (batch, slots, kv_heads, head_dim)
    shapes = (of_queries, of_keys, of_keys, of_queries)
    query, key, value, gradient = (generator.standard_normal(shape) for shape in shapes)
    return tuple(jnp.asarray(x, jnp.dtype(dtype)) for x in (size * query, key, value, gradient))


def float64_gradients(
    query: Any,
    key: Any,
    value: Any,
    out_gradient: Any,
    lse_gradient: np.ndarray | None,
    lengths: list[int] | None,
    causal: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Output, natural LSE and gradients of the plain formula in float64, by autodiff."""
    with jax.enable_x64(True):
        group = query.shape[2] // key.shape[2]
        slots = np.arange(key.shape[1])
        seen = np.ones((query.shape[0], query.shape[1], key.shape[1]), bool)
        if causal:
            seen &= slots <= np.arange(query.shape[1])[:, None]
        if lengths is not None:
            seen &= slots < np.asarray(lengths)[:, None, None]
        blind = ~seen.any(-1)

        def attend(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
            key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
            scores = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
            safe = jnp.where(blind[:, None, :, None], 0.0, scores)
            lse = jax.nn.logsumexp(safe, axis=-1)
            weights = jnp.exp(safe - lse[..., None]) * ~blind[:, None, :, None]
            return jnp.einsum("bnts,bsnh->btnh", weights, value), lse

        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (query, key, value)]
        (out, lse), pull = jax.vjp(attend, *wide)
        of_lse = jnp.zeros_like(lse) if lse_gradient is None else jnp.asarray(lse_gradient)
        of_lse = of_lse * ~blind[:, None]
        gradients = pull((jnp.asarray(np.asarray(out_gradient, np.float64)), of_lse))
        lse = jnp.where(blind[:, None], -jnp.inf, lse)
        return np.asarray(out), np.asarray(lse), tuple(np.asarray(x) for x in gradients)


def rounding_errors(*, head_dim: int, size: float, length: int = 256) -> dict[str, float]:
    """Errors of gradients in float64 whose weights and score gradients are rounded to bfloat16.

    What any kernel has that feeds its products in 16 bits, and whose output came in 16 bits.
    """
    arrays = draw(1, length, length, 1, 1, head_dim, "bfloat16", size)
    scale = head_dim**-0.5
    out, lse, expected = float64_gradients(*arrays, None, None, False, scale)

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float64)

    query, key, value, gradient = (np.asarray(x, np.float64)[0, :, 0] for x in arrays)
    weights = np.exp(query @ key.T * scale - lse[0, 0][:, None])
    delta = (gradient * rounded(out)[0, :, 0]).sum(-1)
    slopes = rounded(weights * (gradient @ value.T - delta[:, None]))
    found = slopes @ key * scale, slopes.T @ query * scale, rounded(weights).T @ gradient
    return {
        name: relative_rms(rounded(got)[None], want[:, :, 0])
        for name, got, want in zip(("query", "key", "value"), found, expected, strict=True)
    }


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
    """The gradients as a case for ahead-of-time compilation."""
    kind = jnp.dtype(dtype)
    query = jax.ShapeDtypeStruct((batch, length, heads, head_dim), kind)
    key = jax.ShapeDtypeStruct((batch, length, kv_heads, head_dim), kind)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)

    def run(query: Any, key: Any, value: Any, out: Any, lse: Any, gradient: Any) -> Any:
        return attention_backward(
            query,
            key,
            value,
            None,
            None,
            out,
            lse,
            gradient,
            None,
            causal=causal,
            scale=head_dim**-0.5,
            soft_cap=None,
            window=None,
            config=BackwardConfig(**config),
        )

    return run, (query, key, key, query, lse, query)


def faulty(*, kernel: str, fault: str) -> dict[str, float]:
    """One of the kernels without one piece of its synchronisation, with enough tiles to need it."""
    many, one = ("tokens", "slots") if kernel == "key_value" else ("slots", "tokens")
    other = "query_gradient_kernel" if kernel == "key_value" else "key_value_gradient_kernel"

    def instead(problem: Problem) -> Callable[..., Any]:
        of_query = jnp.zeros((1, problem.num_tokens, 1, problem.head_dim), problem.dtype)
        of_key = jnp.zeros((1, problem.num_slots, 1, problem.head_dim), problem.dtype)
        return lambda *_: of_query if kernel == "key_value" else (of_key, of_key)

    with mock.patch.object(backward_sm100, other, instead), without(fault, Problem):
        return accuracy(head_dim=64, share=True, **{many: 512, one: 128})
