"""Cases of the Blackwell forward kernel; each runs in the interpreter, in a process of its own."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from edges import relative_rms
from faults import without
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import forward_roles_sm100, forward_sm100
from pallas_kernels.attention_config import forward_config
from pallas_kernels.forward_roles_sm100 import ForwardKernel
from pallas_kernels.proof.interpret import params


def attention64(query, key, value, lengths, start, *, causal, scale, soft_cap, window):
    """Output and LSE in float64; a row that sees nothing gets zeros and minus infinity."""
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    slots, group = key.shape[1], heads // key.shape[2]
    position = np.asarray(start)[:, None] + np.arange(tokens)
    slot = np.arange(slots)
    visible = slot[None, None, :] < np.asarray(lengths)[:, None, None]
    visible = np.broadcast_to(visible, (batch, tokens, slots)).copy()
    if causal:
        visible &= slot <= position[:, :, None]
    if window is not None:
        visible &= slot > position[:, :, None] - window
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) * scale
    if soft_cap is not None:
        scores = np.tanh(scores / soft_cap) * soft_cap
    scores = np.where(visible[:, None], scores, -np.inf)
    top = np.maximum(scores.max(axis=-1, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    out = np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), value)
    return out, lse


def accuracy(
    *,
    batch=1,
    tokens=256,
    slots=256,
    heads=1,
    kv_heads=1,
    head_dim=64,
    dtype="bfloat16",
    loudness=6.0,
    scale=None,
    lengths=None,
    start=None,
    causal=False,
    soft_cap=None,
    window=None,
    poison=None,
    detect_races=True,
    seed=0,
    **settings,
):
    """How far the kernel is from float64 on inputs whose scores spread by `loudness`."""
    rng = np.random.default_rng(seed)
    query = jnp.asarray(rng.normal(size=(batch, tokens, heads, head_dim)) * loudness, dtype)
    key, value = (
        np.asarray(rng.normal(size=(batch, slots, kv_heads, head_dim)), np.float32)
        for _ in range(2)
    )
    if poison is not None:
        for row, length in enumerate(lengths):
            key[row, length:] = poison
            value[row, length:] = poison
    key, value = jnp.asarray(key, dtype), jnp.asarray(value, dtype)
    scale = head_dim**-0.5 if scale is None else scale
    options = {"causal": causal, "scale": scale, "soft_cap": soft_cap, "window": window}
    config = forward_config(head_dim, soft_cap=soft_cap, window=window)
    config = dataclasses.replace(config, **{"programs": 2, **settings})
    as_array = lambda x: None if x is None else jnp.asarray(x, jnp.int32)  # noqa: E731
    arrays = (query, key, value, as_array(lengths), as_array(start))
    reason = forward_sm100.unsupported(*arrays, **options)
    out, lse = forward_sm100.attention(
        *arrays, **options, config=config, interpret=params(detect_races=detect_races)
    )
    out, lse = np.asarray(out).astype(np.float64), np.asarray(lse).astype(np.float64)
    lengths = [slots] * batch if lengths is None else lengths
    start = [0] * batch if start is None else start
    if poison is not None:
        key, value = (jnp.nan_to_num(x, nan=0.0, posinf=0.0) for x in (key, value))
    want, want_lse = attention64(query, key, value, lengths, start, **options)
    seen = np.isfinite(want_lse)
    return {
        "unsupported": reason,
        "relative_rms": relative_rms(out, want),
        "largest_error": float(np.abs(out - want).max()),
        "lse_error": float(np.abs(lse - want_lse)[seen].max()) if seen.any() else 0.0,
        "blind_rows_agree": bool(np.array_equal(seen, np.isfinite(lse))),
        "blind_rows_are_zero": bool((np.swapaxes(out, 1, 2)[~seen] == 0).all()),
    }


def wrong(figures, case):
    """Which figures of `accuracy` are not those of a right kernel."""
    del case
    limits = {"relative_rms": 3e-3, "lse_error": 2e-4}
    flags = ("blind_rows_agree", "blind_rows_are_zero")
    too_large = [name for name, limit in limits.items() if not figures[name] <= limit]
    return too_large + [name for name in flags if not figures[name]]


def compiled(
    *,
    batch=1,
    tokens=8192,
    slots=8192,
    heads=16,
    kv_heads=16,
    head_dim=128,
    dtype="bfloat16",
    ragged=False,
    causal=False,
    soft_cap=None,
    window=None,
    **settings,
):
    """The kernel and the shapes to compile it for."""
    config = forward_config(head_dim, soft_cap=soft_cap, window=window)
    config = dataclasses.replace(config, **settings)
    options = {"causal": causal, "scale": head_dim**-0.5, "soft_cap": soft_cap, "window": window}
    query = jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), jnp.dtype(dtype))
    key = jax.ShapeDtypeStruct((batch, slots, kv_heads, head_dim), jnp.dtype(dtype))
    lengths = (jax.ShapeDtypeStruct((batch,), jnp.int32),) if ragged else ()

    def run(query, key, value, lengths=None):
        return forward_sm100.attention(query, key, value, lengths, None, **options, config=config)

    return run, (query, key, key, *lengths)


def compiled_to_meet_in_votes(**options):
    """The same where the warpgroup meets in what its warps vote about: some would never come."""
    run, shapes = compiled(**options)

    def meet(*, interpret):
        del interpret
        plgpu.wait_load_tmem()

    def run_faulty(*arrays):
        with mock.patch.object(forward_roles_sm100, "wait_tmem_loads", meet):
            return run(*arrays)

    return run_faulty, shapes


def faulty(*, fault, **arguments):
    """The figures of `accuracy` of a kernel without one piece of its synchronisation."""
    with without(fault, ForwardKernel):
        return accuracy(**arguments)
