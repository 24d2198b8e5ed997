import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

B, T, S, H = 3, 4, 16, 8
attention = jax.jit(pallas_kernels.cached_attention)


def make_inputs(num_heads, num_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((B, T, num_heads, H), np.float32)
    keys, values = rng.standard_normal((2, B, num_kv_heads, S, H), np.float32)
    return query, keys, values, np.array([0, 5, S - T], np.int32)


def naive(query, keys, values, start):
    """One query at a time over exactly the slots it may see, float64."""
    queries_per_kv = query.shape[2] // keys.shape[1]
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(*query.shape[:3]):
        visible = start[b] + t + 1
        k, v = (x[b, n // queries_per_kv, :visible].astype(np.float64) for x in (keys, values))
        weights = np.exp(k @ query[b, t, n].astype(np.float64) / math.sqrt(H))
        out[b, t, n] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_matches_a_loop(num_heads, num_kv_heads):
    inputs = make_inputs(num_heads, num_kv_heads)
    np.testing.assert_allclose(attention(*inputs), naive(*inputs), rtol=1e-5, atol=1e-6)


def test_slots_that_nobody_sees_change_nothing():
    query, keys, values, start = make_inputs(4, 2)
    plain = attention(query, keys, values, start)
    for b in range(B):
        keys[b, :, start[b] + T :] = 1e30
        values[b, :, start[b] + T :] = -1e30
    np.testing.assert_array_equal(attention(query, keys, values, start), plain)


def test_no_token_sees_a_later_one():
    query, keys, values, start = make_inputs(4, 2)
    plain = attention(query, keys, values, start)
    values[np.arange(B), :, start + 2] += 1.0
    changed = np.any(np.asarray(attention(query, keys, values, start) != plain), axis=(2, 3))
    np.testing.assert_array_equal(changed, [[False, False, True, True]] * B)


def test_bfloat16_is_computed_in_float32():
    query, keys, values, start = make_inputs(4, 2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (query, keys, values)]
    wide = [np.asarray(x, np.float32) for x in low]
    got = attention(*low, start)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, attention(*wide, start).astype(jnp.bfloat16))


def test_explain_lists_every_op():
    rows = pallas_kernels.explain(jax.devices()[0])
    assert ("cached_attention", "xla", "runs") in rows
    assert {op for op, _, _ in rows} == set(pallas_kernels.registry.IMPLEMENTATIONS)
