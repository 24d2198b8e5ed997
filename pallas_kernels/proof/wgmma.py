"""Hopper's matrix products in JAX's GPU interpreter, with what it leaves out of them.

The interpreter completes a `wgmma` where it is issued, does not look for races with what it reads,
and knows neither a left operand in registers nor an accumulator that starts from a value. Inside
`modelled` it does: operands in shared memory are read beside the thread, as of copies, until a wait
covers the product, and an accumulator that is read before that is an error.
"""

import collections
import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import HostAllocationKey
from jax._src.state import primitives as state_primitives
from jax._src.state.types import AbstractRef

# Objects of JAX's interpreter have no public types.
_Internal = Any


@contextlib.contextmanager
def modelled() -> Iterator[None]:
    """Kernels interpreted inside have their wgmma products modelled."""
    interpreter = jaxpr_interpret.JaxprInterpreter
    replaced = {
        "interpret": _with_stores(interpreter.interpret),
        "_interpret_swap_p": _with_accumulators(interpreter._interpret_swap_p),
        "_interpret_wgmma_ref_p": _interpret_product,
        "_interpret_wgmma_accumulator_deref_p": _interpret_load,
    }
    with mock.patch.multiple(interpreter, **replaced):
        yield


def _with_stores(interpret: _Internal) -> _Internal:
    """`JaxprInterpreter.interpret` that takes storing to an accumulator for a store to memory."""
    store = getattr(primitives, "wgmma_accumulator_store_p", None)

    def with_stores(
        self: _Internal, jaxpr: _Internal, token: _Internal, *arguments: _Internal
    ) -> _Internal:
        equations = [
            equation.replace(
                primitive=state_primitives.swap_p, params={"tree": jax.tree.structure(())}
            )
            if equation.primitive is store
            else equation
            for equation in jaxpr.eqns
        ]
        return interpret(self, jaxpr.replace(eqns=equations), token, *arguments)

    return with_stores


def _with_accumulators(interpret_swap: _Internal) -> _Internal:
    """`JaxprInterpreter._interpret_swap_p` that knows accumulators."""

    def with_accumulators(
        self: _Internal, equation: _Internal, token: _Internal, get_invals: _Internal
    ) -> _Internal:
        if not isinstance(equation.invars[0].aval, core.WGMMAAbstractAccumulatorRef):
            return interpret_swap(self, equation, token, get_invals)
        accumulator, value = get_invals()
        token = callback.io_callback(
            _store,
            gpu_callbacks.TOKEN_SHAPE_DTYPE,
            token=token,
            thread=self.thread,
            accumulator=accumulator,
            value=value,
        )
        return token, [value]  # what was stored: nobody looks at what a store returns

    return with_accumulators


def _interpret_product(
    self: _Internal, equation: _Internal, token: _Internal, get_invals: _Internal
) -> _Internal:
    accumulator, left, right, *leaves = get_invals()
    nothing = jax.tree.structure([])
    trees = [equation.params[f"{name}_transforms_tree"] or nothing for name in ("acc", "a", "b")]
    of_accumulator, of_left, of_right = jax.tree.unflatten(
        jax.tree_util.treedef_tuple(trees), leaves
    )
    in_registers = not isinstance(equation.invars[1].aval, AbstractRef)
    token = callback.io_callback(
        functools.partial(_product, source_info=equation.source_info, in_registers=in_registers),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        thread=self.thread,
        accumulator=(accumulator, of_accumulator),
        left=(left, of_left),
        right=(right, of_right),
    )
    return token, []


def _interpret_load(
    self: _Internal, equation: _Internal, token: _Internal, get_invals: _Internal
) -> _Internal:
    (accumulator,) = get_invals()
    return callback.io_callback(
        functools.partial(_load, wait_n=equation.params["wait_n"]),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, equation.outvars[0].aval),
        token=token,
        thread=self.thread,
        accumulator=accumulator,
    )


def _located(
    memory: _Internal, operand: tuple[_Internal, _Internal]
) -> tuple[_Internal, _Internal]:
    """Key and access of a reference."""
    key = HostAllocationKey.from_array(operand[0])
    transforms = gpu_callbacks._remove_noop_transforms(operand[1])
    return key, memory.access(key, jax.tree.map(int, transforms))


def _content(memory: _Internal, key: _Internal, access: _Internal, thread: _Internal) -> np.ndarray:
    return memory.get_buffer_content(key, access, thread)[0]


def _started(memory: _Internal, thread: _Internal) -> _Internal:
    """A thread's products in flight, kept beside the memory: their accumulators and clocks."""
    threads = vars(memory).setdefault("products_in_flight", {})
    return threads.setdefault(thread, collections.deque())


def _idle(memory: _Internal, thread: _Internal, accumulator: jax.Array) -> _Internal:
    """The key of an accumulator to which no product in flight adds.

    Raises:
        ValueError: One does.
    """
    key = HostAllocationKey.from_array(accumulator)
    if any(key == other for other, _ in _started(memory, thread)):
        raise ValueError(f"An accumulator is used while its product is in flight: {key}.")
    return key


@gpu_callbacks.fail_on_exception
def _product(
    *,
    token: jax.Array,
    thread: _Internal,
    accumulator: tuple[_Internal, _Internal],
    left: tuple[_Internal, _Internal],
    right: tuple[_Internal, _Internal],
    source_info: _Internal,
    in_registers: bool,
) -> jax.Array:
    """Add a product to an accumulator; what it reads counts as read until `_load` waits for it."""
    memory = gpu_callbacks._get_shared_memory()
    clock = None
    if memory.detect_races:
        clock = memory.incr_clock(thread)
        clock.inc(memory.get_next_tma_thread_id())

    def read(operand: tuple[_Internal, _Internal]) -> np.ndarray:
        key, access = _located(memory, operand)
        if clock is not None:
            gpu_callbacks.get_races().check_read(
                thread, clock.async_smem_clock.copy(), key, access, source_info=source_info
            )
        return _content(memory, key, access, thread)

    factors = left[0] if in_registers else read(left), read(right)
    key, access = _located(memory, accumulator)
    total = _content(memory, key, access, thread)
    total = total + np.matmul(*map(np.asarray, factors), dtype=total.dtype)
    memory.store_buffer_content(key, access, total, thread)
    _started(memory, thread).append((key, clock))
    return token


@gpu_callbacks.fail_on_exception
def _store(
    *,
    token: jax.Array,
    thread: _Internal,
    accumulator: jax.Array,
    value: np.ndarray,
) -> jax.Array:
    """Set an accumulator, which no product in flight may add to."""
    memory = gpu_callbacks._get_shared_memory()
    key = _idle(memory, thread, accumulator)
    memory.store_buffer_content(key, memory.access(key, ()), value, thread)
    return token


@gpu_callbacks.fail_on_exception
def _load(
    *,
    token: jax.Array,
    thread: _Internal,
    accumulator: jax.Array,
    wait_n: int | None,
) -> tuple[jax.Array, np.ndarray]:
    """An accumulator's content, after waiting for all but the last `wait_n` products."""
    memory = gpu_callbacks._get_shared_memory()
    started = _started(memory, thread)
    while wait_n is not None and len(started) > wait_n:
        _, clock = started.popleft()
        if clock is not None:
            with memory.lock:
                memory.clocks[thread].update(clock)
    key = _idle(memory, thread, accumulator)
    return token, _content(memory, key, memory.access(key, ()), thread)
