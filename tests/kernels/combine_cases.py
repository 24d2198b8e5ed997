"""Cases of the kernel that merges splits: each runs in a process of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.combine import combine
from pallas_kernels.combine_splits import combine_splits
from pallas_kernels.proof.interpret import params


def parts_of(*, number, head_dim, num_rows, capacity, kv_heads=2, seed=0):
    """Results of splits that exist, and NaN in all others; one row saw nothing in its first."""
    rng = np.random.default_rng(seed)
    shape = (len(number), kv_heads, capacity, num_rows)
    outs = rng.standard_normal((*shape, head_dim), np.float32)
    lses = rng.standard_normal(shape, np.float32) * 8
    outs[:, :, 0, 1], lses[:, :, 0, 1] = np.nan, -np.inf
    unused = np.arange(capacity) >= np.array(number)[:, None]
    outs = np.where(unused[:, None, :, None, None], np.nan, outs)
    lses = np.where(unused[:, None, :, None], np.nan, lses)
    return jnp.asarray(outs), jnp.asarray(lses)


def against_xla(*, number, head_dim, num_rows=8, capacity=12):
    """How far it is from `combine`, and whether a row changes with its batch or the capacity."""
    outs, lses = parts_of(number=number, head_dim=head_dim, num_rows=num_rows, capacity=capacity)
    numbers = jnp.asarray(number, jnp.int32)
    computed = (jnp.arange(capacity) < numbers[:, None])[:, None, :, None]
    want = combine(outs, lses, jnp.broadcast_to(computed, lses.shape))
    got = combine_splits(outs, lses, numbers, interpret=params())
    used = max(number[0], 1)
    alone = combine_splits(outs[:1, :, :used], lses[:1, :, :used], numbers[:1], interpret=params())
    blind = np.isneginf(np.asarray(want[1]))
    return {
        "out": float(np.max(np.abs(got[0] - want[0]))),
        "lse": float(np.max(np.abs(np.where(blind, 0, got[1] - want[1])))),
        "blind_right": bool((np.isneginf(got[1]) == blind).all()),
        "same_alone": all(
            np.array_equal(one[0], many[0]) for one, many in zip(alone, got, strict=True)
        ),
    }


def program(*, head_dim=128, num_rows=128, capacity=128):
    """The kernel on the splits of a cache of 8 kv heads, to be compiled."""
    outs = jax.ShapeDtypeStruct((1, 8, capacity, num_rows, head_dim), jnp.float32)
    lses = jax.ShapeDtypeStruct(outs.shape[:-1], jnp.float32)
    return combine_splits, (outs, lses, jax.ShapeDtypeStruct((1,), jnp.int32))
