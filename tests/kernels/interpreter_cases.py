"""Tiny kernels that are right, race, deadlock or fail, to test the test harness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import store, tiled_smem
from pallas_kernels.proof.interpret import params


def hand_over(*, arrives, waits):
    """One warpgroup writes a vector to shared memory, the other copies it out."""

    @functools.partial(
        plgpu.kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types={
            "smem": plgpu.SMEM((128,), jnp.float32),
            "written": plgpu.Barrier(num_arrivals=1),
        },
        num_threads=2,
        thread_name="warpgroup",
        interpret=params(),
    )
    def kernel(source, target, *, smem, written):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            smem[...] = source[...] + 1
            if arrives:
                plgpu.barrier_arrive(written)

        @pl.when(warpgroup == 1)
        def _():
            if waits:
                plgpu.barrier_wait(written)
            target[...] = smem[...]

    out = kernel(jnp.arange(128, dtype=jnp.float32))
    return {"right": bool((out == jnp.arange(1, 129)).all())}


def races_then_not():
    """A kernel that races, then one that does not."""
    hand_over(arrives=False, waits=False)
    return hand_over(arrives=True, waits=True)


def product(*, waits, overwrites):
    """A sum that starts at 1, plus a product of registers and shared memory, on Hopper."""
    shape = (64, 64)

    @functools.partial(
        plgpu.kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch_types={"smem": tiled_smem(shape, jnp.bfloat16), "loaded": plgpu.Barrier()},
        num_threads=1,
        thread_name="warpgroup",
        interpret=params(),
    )
    def kernel(left, right, target, *, smem, loaded):
        plgpu.copy_gmem_to_smem(right, smem, loaded)
        plgpu.barrier_wait(loaded)
        registers = plgpu.load(left, layout=plgpu.Layout.WGMMA, optimized=False)

        def multiply(accumulator):
            accumulator[...] = plgpu.layout_cast(jnp.ones(shape, jnp.float32), plgpu.Layout.WGMMA)
            plgpu.wgmma(accumulator, registers, smem)
            if overwrites:
                smem[...] = registers
            return plgpu.wgmma_accumulator_load(accumulator, wait_n=0 if waits else None)

        total = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        store(target, total)

    left, right = np.random.default_rng(0).integers(-3, 4, (2, *shape))
    out = kernel(jnp.asarray(left, jnp.bfloat16), jnp.asarray(right, jnp.bfloat16))
    return {"right": bool((np.asarray(out) == 1 + left @ right).all())}


def failing():
    raise ValueError("this case fails")
