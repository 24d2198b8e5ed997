"""What Pallas' GPU dialect lacks or names differently between JAX 0.11 and 0.12.

Kernels run in the interpreter with both; with which of them a GPU gets them, `registry` says.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

# One thread holds one row of a tensor-memory tile: row sums and maxima need no shuffles.
TMEM_LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE
TMEM_ROW_LAYOUT = TMEM_LAYOUT.reduce(1)
# The layout in which a tile goes to swizzled shared memory.
OUT_LAYOUT = plgpu.Layout.TCGEN05
OUT_ROW_LAYOUT = OUT_LAYOUT.reduce(1)

# References to memory and barriers have no public type.
Ref = Any

_ALL_LANES = 0xFFFFFFFF


def warp_any(rows: jax.Array, *, interpret: bool) -> jax.Array:
    """Whether a flag is set in any row of this warp: a scalar bool, equal in the warp's 32 lanes.

    `rows` has shape [128], bool, one row a thread (TMEM_ROW_LAYOUT); each warp of the warpgroup
    gets its own answer. The interpreter knows no warps: there, it is that of the warpgroup.
    """
    if interpret:
        return jnp.any(rows)

    @plgpu.inline_mgpu(
        arg_types=(TMEM_ROW_LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(bool), layout=plgpu.Layout.WG_SPLAT),
    )
    def vote(_: object, flags: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        flag = functools.reduce(arith.ori, flags.registers.flat)
        if isinstance(flag.type, ir.VectorType):
            flag = vector.extract(flag, [], [0])
        lanes = arith.constant(ir.IntegerType.get_signless(32), _ALL_LANES)
        any_lane = nvvm.vote_sync(lanes, flag, "any")
        return mgpu.FragmentedArray.splat(any_lane, (), is_signed=False)

    return vote(rows)  # pyright: ignore[reportCallIssue]  # the decorator supplies the context


def wait_tmem_loads(*, interpret: bool) -> None:
    """Wait until this warp's loads from tensor memory have read it.

    `plgpu.wait_load_tmem` also makes the four warps of the warpgroup meet, which a branch that only
    some of them take must not do; the interpreter knows no warps, and only that function.
    """
    if interpret:
        plgpu.wait_load_tmem()
    else:
        _wait_tmem(nvvm.Tcgen05WaitKind.LOAD)


def wait_tmem_stores(*, interpret: bool) -> None:
    """Wait until this warp's stores to tensor memory are there; see `wait_tmem_loads`."""
    if interpret:
        plgpu.commit_tmem()
    else:
        _wait_tmem(nvvm.Tcgen05WaitKind.STORE)


def _wait_tmem(kind: nvvm.Tcgen05WaitKind) -> None:
    @plgpu.inline_mgpu()
    def wait(_: object) -> None:
        nvvm.tcgen05_wait(kind)

    wait()  # pyright: ignore[reportCallIssue]  # the decorator supplies the context


def end_smem_reads(*, interpret: bool) -> None:
    """Let bulk copies that this warp starts next write where others, as it has waited for, read.

    For one warp: `plgpu.commit_smem` does the same and makes the four warps of a warpgroup meet.
    """
    if interpret:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def fence(_: object) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()  # pyright: ignore[reportCallIssue]  # the decorator supplies the context


def store(ref: Ref, values: jax.Array) -> None:
    """Write values from registers to a reference in whatever layout they have.

    JAX 0.12 has a function for that, which also takes layouts that do not coalesce; before, the
    plain assignment does.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def tiled_smem(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Ref:
    """Shared memory of 16-bit rows, swizzled as the tensor core and TMA want them.

    The swizzle spans 64 columns, or the whole row if that is shorter.
    """
    columns = min(shape[-1], 64)
    tiling = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(2 * columns)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))
