"""Attention of long prompts and its gradients in XLA, some query tokens at a time.

The reference holds the scores of all tokens at once: 137 GB in float32 for 32 heads of 32k tokens
over 32k slots. This is the same arithmetic, in a loop over as many tokens as have a bounded number
of scores. It is for chips without kernels of these ops and for what their kernels cannot compute.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import reference
from pallas_kernels.registry import Kernel

_MOST_SCORES = 1 << 26  # that are held at once: 256 MiB; gradients hold a few such arrays


def unsupported(query: Any, key: Any, *others: Any, **options: Any) -> str | None:  # noqa: ANN401
    """Why a call is left to the reference, or None; takes shapes."""
    del others, options
    number = query.shape[1] * _scores_of_token(query, key)
    if number > _MOST_SCORES:
        return None
    return (
        f"is for more than {_MOST_SCORES} scores, which the reference holds at once, got {number}"
    )


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    *,
    block: int | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `reference.attention`; `block` tokens at a time."""
    block = block or _block(query, key)

    def attend(part: tuple[Array, Array]) -> tuple[Array, Array]:
        query, start = part
        return reference.attention(query, key, value, lengths, start, **options)

    starts = _starts(query, start, block)
    outs, lses = jax.lax.map(attend, (_split(query, 1, block), starts))
    num_tokens = query.shape[1]
    return _join(outs, 1)[:, :num_tokens], _join(lses, 2)[:, :, :num_tokens]


def attention_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | None,
    start: Int[Array, "B"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    out_gradient: Float[Array, "B T N H"],
    lse_gradient: Float[Array, "B N T"] | None,
    *,
    block: int | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """See `reference.attention_backward`; `block` tokens at a time, sums in float32."""
    block = block or _block(query, key)
    key32, value32 = key.astype(jnp.float32), value.astype(jnp.float32)

    def add(sums: tuple[Array, Array], part: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        query, start, *others = part
        of_query, *of_cache = reference.attention_backward(
            query, key32, value32, lengths, start, *others, **options
        )
        of_key, of_value = (x + y for x, y in zip(sums, of_cache, strict=True))
        return (of_key, of_value), of_query

    parts = (
        _split(query, 1, block),
        _starts(query, start, block),
        _split(out, 1, block),
        # Tokens that are not there weigh nothing, whatever their scores.
        _split(lse, 2, block, missing=math.inf),
        _split(out_gradient, 1, block),
        None if lse_gradient is None else _split(lse_gradient, 2, block),
    )
    nothing = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    (of_key, of_value), of_query = jax.lax.scan(add, nothing, parts)
    of_query = _join(of_query, 1)[:, : query.shape[1]]
    return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype)


KERNELS = {
    "attention": Kernel(run=attention, unsupported=unsupported),
    "attention_backward": Kernel(run=attention_backward, unsupported=unsupported),
}


def _scores_of_token(query: Any, key: Any) -> int:  # noqa: ANN401
    """How many scores one token of every row has."""
    return query.shape[0] * query.shape[2] * key.shape[1]


def _block(query: Array, key: Array) -> int:
    """As many tokens as may be taken at a time."""
    most = max(1, _MOST_SCORES // _scores_of_token(query, key))
    return min(most, query.shape[1])


def _starts(query: Array, start: Array | None, block: int) -> Int[Array, "C B"]:
    """The position of the first token of each part."""
    start = jnp.zeros(query.shape[:1], jnp.int32) if start is None else start.astype(jnp.int32)
    return start + jnp.arange(0, query.shape[1], block, dtype=jnp.int32)[:, None]


def _split(x: Array, axis: int, block: int, missing: float = 0.0) -> Array:
    """X in parts of `block` tokens along a new first axis; what the last lacks is `missing`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, widths, constant_values=jnp.asarray(missing, x.dtype))
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _join(parts: Array, axis: int) -> Array:
    """The inverse of `_split`, with what was missing."""
    x = jnp.moveaxis(parts, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
