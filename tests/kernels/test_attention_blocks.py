"""Attention of long prompts in parts: equal to the reference, in bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import attention_blocks, reference

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
OPTIONS = {"causal": False, "scale": 0.4, "soft_cap": None, "window": None}
LENGTHS, START = jnp.array([7, 0], jnp.int32), jnp.array([2, 1], jnp.int32)
CASES = {
    "plain": ({}, None, None),
    "causal": ({"causal": True}, None, None),
    "everything": ({"causal": True, "soft_cap": 2.0, "window": 3}, LENGTHS, START),
}


def draw(*shape, seed=0, dtype="float32"):
    values = np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)
    return jnp.asarray(values, dtype)


def arrays(case, dtype):
    options, lengths, start = CASES[case]
    key, value = (draw(B, S, K, H, seed=seed, dtype=dtype) for seed in (1, 2))
    return OPTIONS | options, (draw(B, T, N, H, dtype=dtype), key, value, lengths, start)


@pytest.mark.parametrize("block", [1, 4, T])
@pytest.mark.parametrize("case", CASES)
def test_parts_are_the_whole(case, block):
    options, inputs = arrays(case, "float32")
    got = jax.jit(functools.partial(attention_blocks.attention, block=block, **options))(*inputs)
    want = jax.jit(functools.partial(reference.attention, **options))(*inputs)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 4, T])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_parts_add_up(case, block, dtype):
    options, inputs = arrays(case, dtype)
    out, lse = reference.attention(*inputs, **options)
    for of_lse in (None, draw(B, N, T, seed=4)):
        given = (*inputs, out, lse, draw(B, T, N, H, seed=3, dtype=dtype), of_lse)
        run = functools.partial(attention_blocks.attention_backward, block=block, **options)
        want = jax.jit(functools.partial(reference.attention_backward, **options))(*given)
        for one, other in zip(jax.jit(run)(*given), want, strict=True):
            assert one.dtype == other.dtype
            assert np.isfinite(np.asarray(one, np.float32)).all()
            tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
            np.testing.assert_allclose(
                np.asarray(one, np.float32),
                np.asarray(other, np.float32),
                rtol=tolerance,
                atol=tolerance,
            )


def test_long_prompts_take_bounded_memory():
    """Compiled, not run: 32 heads of 32k tokens over 32k slots, whose scores are 137 GB."""
    shape = jax.ShapeDtypeStruct((1, 32768, 32, 128), jnp.bfloat16)
    few = jax.ShapeDtypeStruct((1, 32768, 8, 128), jnp.bfloat16)

    def loss(query, key, value):
        out = pallas_kernels.attention(query, key, value, causal=True)
        return jnp.sum(out.astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, few, few).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3e9


def test_short_prompts_are_left_to_the_reference():
    query = jax.ShapeDtypeStruct((1, 64, 4, 8), "float32")
    key = jax.ShapeDtypeStruct((1, 64, 2, 8), "float32")
    assert attention_blocks.unsupported(query, key) == (
        "is for more than 67108864 scores, which the reference holds at once, got 16384"
    )
