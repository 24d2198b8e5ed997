"""Tiny kernels that are right, race, deadlock or fail, to test the test harness."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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


def failing():
    raise ValueError("this case fails")
