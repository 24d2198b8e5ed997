"""Branches on a trunk: each is what the whole model says to its own text, all of it at once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILY_NAMES, prompt_ids, tiny

import pallas_kernels
from ssd_jax.kv_cache import init_cache
from ssd_jax.models.branches import forward_branches, init_branches
from ssd_jax.models.decoder import compute_logits, forward

B, R, S, J, H = 2, 5, 16, 3, 8
_attention = jax.jit(pallas_kernels.tree_attention)
LENGTHS = np.array([[1, 4, 4, 16, 7], [3, 3, 3, 2, 9]], np.int32)


def attention(*inputs):
    """The result once it is there: until then JAX may read the arrays, which a test changes."""
    return np.asarray(_attention(*inputs))


def make_inputs(num_heads, num_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((B, R, num_heads, H), np.float32)
    trunk_keys, trunk_values = rng.standard_normal((2, B, num_kv_heads, S, H), np.float32)
    keys, values = rng.standard_normal((2, B, num_kv_heads, J, R, H), np.float32)
    return [query, trunk_keys, trunk_values, LENGTHS, keys, values]


def naive(query, trunk_keys, trunk_values, lengths, keys, values, step):
    """One query at a time over a list of exactly what it may see, float64."""
    group = query.shape[2] // keys.shape[1]
    out = np.zeros(query.shape)
    for b, r, n in np.ndindex(*query.shape[:3]):
        k, length = n // group, lengths[b, r]
        seen_keys = [*trunk_keys[b, k, :length], *keys[b, k, : step + 1, r]]
        seen_values = [*trunk_values[b, k, :length], *values[b, k, : step + 1, r]]
        scores = np.array(seen_keys, np.float64) @ query[b, r, n] / math.sqrt(H)
        weights = np.exp(scores)
        out[b, r, n] = weights @ np.array(seen_values, np.float64) / weights.sum()
    return out


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_matches_a_loop(num_heads, num_kv_heads, step):
    inputs = [*make_inputs(num_heads, num_kv_heads), np.int32(step)]
    np.testing.assert_allclose(attention(*inputs), naive(*inputs), rtol=1e-5, atol=1e-6)


def test_what_nobody_sees_changes_nothing():
    query, trunk_keys, trunk_values, lengths, keys, values = make_inputs(4, 2)
    step = np.int32(1)
    plain = attention(query, trunk_keys, trunk_values, lengths, keys, values, step)
    trunk_keys[1, :, 9:], trunk_values[1, :, 9:] = 1e30, -1e30
    keys[:, :, 2:], values[:, :, 2:] = 1e30, -1e30
    again = attention(query, trunk_keys, trunk_values, lengths, keys, values, step)
    np.testing.assert_array_equal(again, plain)


def test_a_branch_sees_no_other():
    query, trunk_keys, trunk_values, lengths, keys, values = make_inputs(4, 2)
    step = np.int32(1)
    plain = attention(query, trunk_keys, trunk_values, lengths, keys, values, step)
    values[:, :, :, 2] += 1
    again = attention(query, trunk_keys, trunk_values, lengths, keys, values, step)
    changed = np.any(np.asarray(again != plain), axis=(2, 3))
    np.testing.assert_array_equal(changed, [[False, False, True, False, False]] * B)


def test_bfloat16_is_computed_in_float32():
    query, trunk_keys, trunk_values, lengths, keys, values = make_inputs(4, 2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (query, trunk_keys, trunk_values, keys, values)]
    wide = [np.asarray(x, np.float32) for x in low]
    got = attention(*low[:3], lengths, *low[3:], np.int32(2))
    assert got.dtype == jnp.bfloat16
    full = attention(*wide[:3], lengths, *wide[3:], np.int32(2))
    np.testing.assert_array_equal(got, full.astype(jnp.bfloat16))


SLOW = pytest.mark.slow
FAMILIES = [pytest.param(f, marks=SLOW if f in ("llama", "qwen2") else ()) for f in FAMILY_NAMES]


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_forward_passes_of_their_whole_texts(family):
    """For every step of every branch, whatever lies in the trunk past its part of it."""
    one = tiny(family)
    config, params = one.config, one.params
    trunk_tokens = np.array([prompt_ids(S, seed=row) for row in range(B)], np.int32)
    start = np.zeros(B, np.int32)
    cache = init_cache(config, B, S, jnp.float32)
    _, trunk = jax.jit(functools.partial(forward, config))(params, trunk_tokens, cache, start)
    grown = np.random.default_rng(5).integers(0, config.vocab_size, (J, B, R), dtype=np.int32)
    branches = init_branches(config, B, J, R, jnp.float32)

    @jax.jit
    def logits_of(tokens, branches, step):
        hidden, branches = forward_branches(
            config, params, tokens, trunk, jnp.asarray(LENGTHS), branches, step
        )
        return compute_logits(params, hidden), branches

    got = []
    for step in range(J):
        logits, branches = logits_of(grown[step], branches, np.int32(step))
        got.append(np.asarray(logits))
    for b, r in np.ndindex(B, R):
        length = LENGTHS[b, r]
        text = [*trunk_tokens[b, :length].tolist(), *grown[:, b, r].tolist()]
        expected = one.logits(text)[length:]
        np.testing.assert_allclose([each[b, r] for each in got], expected, rtol=1e-4, atol=1e-4)
