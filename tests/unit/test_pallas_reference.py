"""The specification of the ops on caches, against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

B, T, S, H = 3, 4, 16, 8
verify = jax.jit(pallas_kernels.verify_attention)
decode = jax.jit(pallas_kernels.decode_attention)
ancestor = jax.jit(pallas_kernels.ancestor_attention)
START = np.array([0, 5, S - T], np.int32)
HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])


def make_inputs(num_heads, num_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((B, T, num_heads, H), np.float32)
    keys, values = rng.standard_normal((2, B, num_kv_heads, S, H), np.float32)
    return query, keys, values


def causal_slots(start):
    """Which slots [B T S] tokens in slots start + t see."""
    return np.arange(S) <= (start[:, None] + np.arange(T))[..., None]


def naive(query, keys, values, visible):
    """One query at a time over exactly the slots it may see, float64; zeros if there are none."""
    queries_per_kv = query.shape[2] // keys.shape[1]
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(*query.shape[:3]):
        k, v = (x[b, n // queries_per_kv, visible[b, t]].astype(float) for x in (keys, values))
        weights = np.exp(k @ query[b, t, n].astype(float) / math.sqrt(H))
        out[b, t, n] = weights @ v / weights.sum() if len(k) else 0
    return out


@HEADS
def test_verify_matches_a_loop(num_heads, num_kv_heads):
    inputs = make_inputs(num_heads, num_kv_heads)
    expected = naive(*inputs, causal_slots(START))
    np.testing.assert_allclose(verify(*inputs, START), expected, rtol=1e-5, atol=1e-6)


@HEADS
def test_decode_matches_a_loop_and_an_empty_row_is_zero(num_heads, num_kv_heads):
    query, keys, values = make_inputs(num_heads, num_kv_heads)
    lengths = np.array([0, 5, S], np.int32)
    visible = np.broadcast_to(np.arange(S) < lengths[:, None, None], (B, 1, S))
    got = decode(query[:, 0], keys, values, lengths)
    expected = naive(query[:, :1], keys, values, visible)[:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[0], 0)


@pytest.mark.parametrize("nodes", [4, 40, 64])
def test_ancestors_match_a_loop(nodes):
    """Random trees whose tokens are some of the nodes, all of the words' bits in use."""
    rng = np.random.default_rng(nodes)
    slots = nodes + 9
    query = rng.standard_normal((B, T, 4, H), np.float32)
    keys, values = rng.standard_normal((2, B, 2, slots, H), np.float32)
    prefix = np.array([0, 4, 9], np.int32)
    bits = rng.random((B, T, 64)) < 0.5
    bits[:, :, nodes:] = False
    bits[:, 0], bits[:, 1, nodes - 1] = False, True
    words = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)
    node = np.arange(slots) - prefix[:, None]
    picked = np.stack([bits[b][:, np.clip(node[b], 0, 63)] & (node[b] < 64) for b in range(B)])
    visible = (node < 0)[:, None] | (node >= 0)[:, None] & picked
    got = ancestor(query, keys, values, prefix, words)
    expected = naive(query, keys, values, visible)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[0, 0], 0)  # no prefix, no ancestor


def test_a_chain_of_ancestors_is_verification():
    query, keys, values = make_inputs(4, 2)
    chain = np.array([[(2 << t) - 1, 0] for t in range(T)], np.uint32)
    got = ancestor(query, keys, values, START, np.broadcast_to(chain, (B, T, 2)))
    np.testing.assert_array_equal(got, verify(query, keys, values, START))


def test_slots_that_nobody_sees_change_nothing():
    query, keys, values = make_inputs(4, 2)
    plain = np.asarray(verify(query, keys, values, START))  # before its inputs change
    for b in range(B):
        keys[b, :, START[b] + T :] = 1e30
        values[b, :, START[b] + T :] = -1e30
    np.testing.assert_array_equal(verify(query, keys, values, START), plain)


def test_no_token_sees_a_later_one():
    query, keys, values = make_inputs(4, 2)
    plain = np.asarray(verify(query, keys, values, START))  # before its inputs change
    values[np.arange(B), :, START + 2] += 1.0
    changed = np.any(np.asarray(verify(query, keys, values, START) != plain), axis=(2, 3))
    np.testing.assert_array_equal(changed, [[False, False, True, True]] * B)


def test_bfloat16_is_computed_in_float32():
    low = [jnp.asarray(x, jnp.bfloat16) for x in make_inputs(4, 2)]
    wide = [np.asarray(x, np.float32) for x in low]
    got = verify(*low, START)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, verify(*wide, START).astype(jnp.bfloat16))
