"""Kernels inside `jax.shard_map` with its checks: which mesh axes their results vary over.

Inside, the type of every array says over which axes of the mesh it varies. Kernels (Pallas, Triton)
and loops that start from constants know nothing of it and refuse such arrays. Here the function is
traced with arrays that vary over nothing, as `check_vma=False` would, and becomes one operation
whose results vary over whatever its arguments do: right for a function that does not communicate.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Primitive,
    jaxpr_as_fun,
)
from jax.interpreters import batching, mlir
from jaxtyping import Array

_PER_DEVICE = Primitive("attention_per_device")
_PER_DEVICE.multiple_results = True


def per_device(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """`function(*arguments)`, pytrees of arrays, of what does not communicate between devices."""
    leaves, tree = jax.tree.flatten(arguments)
    if not _axes(leaves):
        return function(*arguments)

    def flat(*leaves: Array) -> Any:  # noqa: ANN401
        return function(*jax.tree.unflatten(tree, leaves))

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    jaxpr, results = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    outs = _PER_DEVICE.bind(*leaves, jaxpr=jaxpr)
    return jax.tree.unflatten(jax.tree.structure(results), outs)


def vary_alike(*arrays: Array | None) -> tuple[Array | None, ...]:
    """The arrays, all of them varying over the axes that any of them varies over.

    Gradients then vary like what they are gradients of, and JAX adds up those of an array that was
    the same on several devices.
    """
    axes = _axes([x for x in arrays if x is not None])

    def cast(x: Array | None) -> Array | None:
        missing = () if x is None else tuple(sorted(axes - _axes([x])))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(cast, arrays))


def _axes(arrays: list[Array]) -> frozenset[Any]:
    """The mesh axes that the types of some arrays say they vary over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


@_PER_DEVICE.def_impl
def _compute(*arrays: Array, jaxpr: ClosedJaxpr) -> list[Array]:
    return jaxpr_as_fun(jaxpr)(*arrays)


@_PER_DEVICE.def_effectful_abstract_eval
def _types(*types: Any, jaxpr: ClosedJaxpr) -> Any:  # noqa: ANN401
    axes = frozenset().union(*(one.manual_axis_type.varying for one in types))
    varying = type(types[0].manual_axis_type)(varying=axes)
    return [one.update(manual_axis_type=varying) for one in jaxpr.out_avals], jaxpr.effects


def _lower(context: mlir.LoweringRuleContext, *arrays: Any, jaxpr: ClosedJaxpr) -> Any:  # noqa: ANN401
    context = context.replace(avals_in=jaxpr.in_avals, avals_out=jaxpr.out_avals)
    return mlir.lower_fun(jaxpr_as_fun(jaxpr))(context, *arrays)


def _batch(arrays: Any, axes: Any, *, jaxpr: ClosedJaxpr) -> Any:  # noqa: ANN401
    outs = per_device(jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes)), *arrays)
    return outs, [0] * len(outs)


mlir.register_lowering(_PER_DEVICE, _lower)
batching.primitive_batchers[_PER_DEVICE] = _batch
