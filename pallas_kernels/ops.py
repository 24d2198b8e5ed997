"""The public attention ops: checks, the choice of an implementation, gradients.

Axis letters: B batch, T query tokens, S key/value slots, N query heads, K kv heads (N a multiple of
K), H head dim, R branches, J steps of a branch. `scale` multiplies the scores, and is H**-0.5
unless given. Keys and values of a cache, [X K Z H], are those of each row, [B K S H]; or, with a
page table, a pool of pages for all rows, in which slot s of row b lies in page
page_table[b, s // Z] (PagedAttention, Kwon et al. 2023).

Every op takes the name of an implementation; without one the first runs that can compute the call,
at the latest the XLA reference, which is the specification: also of what slots that nobody sees may
hold, and of what NaN does. Gradients are computed by the named implementation too, which may have
none; without a name they too get the first that can, whichever computed the forward pass.

The choice is made when a call is made, or traced: for the chip that the arrays are on, or inside
jit for `registry.target_chip` (that of the mesh, else of the default device). A program traced
without a name holds the ways of that chip and of a CPU, and takes the one of the platform it is
lowered for. So what is exported or compiled for a GPU which this process neither has nor was told
of runs the reference: name the implementation, or trace inside jax.sharding.use_abstract_mesh with
an abstract device of that GPU's name.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.manual_axes import per_device, vary_alike
from pallas_kernels.registry import (
    CPU,
    IMPLEMENTATIONS,
    XLA,
    Implementation,
    UnsupportedError,
    chip_of,
    choose,
    device_of,
    target_chip,
)

_logger = logging.getLogger(__name__)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: Int[Array, "B"] | None = None,
    start: Int[Array, "B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of a whole prompt, in the value's dtype; differentiable in query, key and value.

    Token t has position start[b] + t (t without start). It sees the slots s < lengths[b] (all
    without lengths), if causal only s <= its position, and with a window only s > position -
    window. `soft_cap` c turns scores x into c * tanh(x / c). A token that sees nothing gets zeros.

    Raises:
        ValueError: Shapes or options that mean nothing, or an unknown implementation.
        UnsupportedError: The named implementation cannot compute this, or its gradients if the call
            is differentiated.
    """
    prompt = _Prompt(
        causal=causal,
        scale=_scale(scale, query.shape[-1]),
        soft_cap=soft_cap,
        window=window,
        with_lse=False,
        implementation=implementation,
    )
    return _checked_attention(prompt, query, key, value, lengths, start)[0]


def attention_with_lse(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    lengths: Int[Array, "B"] | None = None,
    start: Int[Array, "B"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`attention`, and the natural logarithm of the sum of exponentiated scores, float32.

    The LSE of a token that sees nothing is minus infinity.
    """
    prompt = _Prompt(
        causal=causal,
        scale=_scale(scale, query.shape[-1]),
        soft_cap=soft_cap,
        window=window,
        with_lse=True,
        implementation=implementation,
    )
    return _checked_attention(prompt, query, key, value, lengths, start)


def decode_attention(
    query: Float[Array, "B N H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    page_table: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one token a row to the first lengths[b] slots, in the values' dtype.

    Raises: as `attention`.
    """
    _check_heads(query.shape[1], keys.shape[1])
    options = {"scale": _scale(scale, query.shape[-1]), "page_table": page_table}
    return _run("decode_attention", implementation, options, query, keys, values, lengths)


def verify_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    start: Int[Array, "B"],
    *,
    scale: float | None = None,
    page_table: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of a few tokens over a cache that holds them, in the values' dtype.

    Token t of row b sits in slot start[b] + t and sees the slots 0 .. start[b] + t.

    Raises: as `attention`.
    """
    _check_heads(query.shape[2], keys.shape[1])
    options = {"scale": _scale(scale, query.shape[-1]), "page_table": page_table}
    return _run("verify_attention", implementation, options, query, keys, values, start)


def ancestor_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "X K Z H"],
    values: Float[Array, "X K Z H"],
    prefix: Int[Array, "B"],
    ancestors: UInt32[Array, "B T 2"],
    *,
    scale: float | None = None,
    page_table: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of the tokens of a tree that grows from a shared prefix, in the values' dtype.

    Node i of the tree (i < 64) sits in slot prefix[b] + i. Token t sees all slots before prefix[b]
    and the nodes whose bits are set in ancestors[b, t], the low word first; its own bit is among
    them if it sees itself. Bits of nodes past the last slot mean nothing.

    Raises: as `attention`.
    """
    _check_heads(query.shape[2], keys.shape[1])
    options = {"scale": _scale(scale, query.shape[-1]), "page_table": page_table}
    arrays = (query, keys, values, prefix, ancestors)
    return _run("ancestor_attention", implementation, options, *arrays)


def tree_attention(
    query: Float[Array, "B R N H"],
    trunk_keys: Float[Array, "X K Z H"],
    trunk_values: Float[Array, "X K Z H"],
    trunk_lengths: Int[Array, "B R"],
    branch_keys: Float[Array, "B K J R H"],
    branch_values: Float[Array, "B K J R H"],
    step: Int[Array, ""],
    *,
    scale: float | None = None,
    page_table: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B R N H"]:
    """Attention of one token in each of R branches that grow from one trunk, in the values' dtype.

    Branch r of row b sees trunk slots 0 .. trunk_lengths[b, r] - 1 and its own keys of steps
    0 .. step, under one softmax. The trunk is read once for all branches.

    Raises: as `attention`.
    """
    _check_heads(query.shape[2], trunk_keys.shape[1])
    options = {"scale": _scale(scale, query.shape[-1]), "page_table": page_table}
    arrays = (trunk_keys, trunk_values, trunk_lengths, branch_keys, branch_values, step)
    return _run("tree_attention", implementation, options, query, *arrays)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """What of a call of `attention` is known when it is traced."""

    causal: bool
    scale: float
    soft_cap: float | None
    window: int | None
    with_lse: bool
    implementation: str | None

    @property
    def options(self) -> dict[str, Any]:
        """The options of an implementation."""
        return {
            "causal": self.causal,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "window": self.window,
        }


def _checked_attention(
    prompt: _Prompt,
    query: Array,
    key: Array,
    value: Array,
    lengths: Array | None,
    start: Array | None,
) -> tuple[Array, Array]:
    _check_heads(query.shape[2], key.shape[2])
    if prompt.window is not None and prompt.window < 1:
        raise ValueError(f"window must be at least 1 slot, got {prompt.window}.")
    if prompt.soft_cap is not None and prompt.soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, got {prompt.soft_cap}; None is no cap.")
    return _attention(prompt, *vary_alike(query, key, value, lengths, start))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    prompt: _Prompt,
    query: Array,
    key: Array,
    value: Array,
    lengths: Array | None,
    start: Array | None,
) -> tuple[Array, Array]:
    arrays = (query, key, value, lengths, start)
    return _run("attention", prompt.implementation, prompt.options, *arrays)


def _attention_forward(
    prompt: _Prompt, *arrays: Array | None
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    out, lse = _run("attention", prompt.implementation, prompt.options, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attention_backward(
    prompt: _Prompt, residuals: tuple[Array | None, ...], gradients: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    """Gradients by the named implementation, or by the first that can."""
    out_gradient, lse_gradient = gradients
    names = [one.name for one in IMPLEMENTATIONS["attention_backward"]]
    if prompt.implementation not in (None, *names):
        raise UnsupportedError(
            f"The implementation {prompt.implementation!r} of attention has no gradients: to "
            f"differentiate, name one of {', '.join(names)}, or none to get the first that can."
        )
    arrays = (*residuals, out_gradient, lse_gradient if prompt.with_lse else None)
    return (*_run("attention_backward", prompt.implementation, prompt.options, *arrays), None, None)


_attention.defvjp(_attention_forward, _attention_backward)


def _run(op: str, named: str | None, options: dict[str, Any], *arrays: Array | None) -> Any:  # noqa: ANN401
    """The op by the named implementation, or by the first that can compute the call."""
    implementations = IMPLEMENTATIONS[op]
    device = device_of((arrays, options))
    chip = target_chip() if device is None else chip_of(device)
    chosen = choose(implementations, op, chip, arrays, options, named)
    _logger.debug("%s runs as %s on %s", op, chosen.name, chip.kind)
    traced = {name: value for name, value in options.items() if name == "page_table"}
    static = {name: value for name, value in options.items() if name not in traced}

    def run_as(implementation: Implementation) -> Callable[..., Any]:
        kernel = functools.partial(implementation.kernel(op).run, **static)

        def run(traced: dict[str, Array | None], *arrays: Array | None) -> Any:  # noqa: ANN401
            return kernel(*arrays, **traced)

        return run if implementation.name == XLA else functools.partial(per_device, run)

    if named is not None or device is not None:
        return run_as(chosen)(traced, *arrays)
    # For which platform the program is lowered is decided later: on this chip's or on a CPU beside
    # it. Any other gets the reference.
    on_cpu = choose(implementations, op, CPU, arrays, options, None)
    ways = {"cpu": on_cpu, "cuda": chosen if chip.platform == "gpu" else implementations[-1]}
    if len({implementation.name for implementation in ways.values()} | {XLA}) == 1:
        return run_as(on_cpu)(traced, *arrays)
    runs = {platform: run_as(implementation) for platform, implementation in ways.items()}
    runs["default"] = run_as(implementations[-1])
    return jax.lax.platform_dependent(traced, *arrays, **runs)


def _scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else float(scale)


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(
            f"The number of query heads must be a multiple of the kv heads, got {num_heads} and "
            f"{num_kv_heads}."
        )
