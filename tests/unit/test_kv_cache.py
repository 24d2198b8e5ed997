import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, tiny

from ssd_jax.kv_cache import gather_rows, init_cache, rewind_cache, write_slots
from ssd_jax.models.decoder import forward

K, S, H, T = 2, 8, 4, 3
TEXT, CHUNK = 24, 4  # longest text of the property test, and most tokens appended at once
ROWS = 2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("jitted", [False, True])
def test_write_slots_with_one_start_a_row(batch, jitted):
    rng = np.random.default_rng(0)
    write = jax.jit(write_slots) if jitted else write_slots
    for first in range(S - T + 1):
        buffer = rng.standard_normal((batch, K, S, H), np.float32)
        new = rng.standard_normal((batch, T, K, H), np.float32)
        starts = (np.arange(batch, dtype=np.int32) * 2 + first) % (S - T + 1)
        expected = buffer.copy()
        for row, start in enumerate(starts):
            expected[row, :, start : start + T] = new[row].transpose(1, 0, 2)
        got = write(jnp.asarray(buffer), jnp.asarray(new), jnp.asarray(starts))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_write_slots_with_one_start_for_all_rows(batch):
    rng = np.random.default_rng(1)
    for start in range(S - T + 1):
        buffer = rng.standard_normal((batch, K, S, H), np.float32)
        new = rng.standard_normal((batch, T, K, H), np.float32)
        expected = buffer.copy()
        expected[:, :, start : start + T] = new.transpose(0, 2, 1, 3)
        got = write_slots(jnp.asarray(buffer), jnp.asarray(new), jnp.int32(start))
        np.testing.assert_array_equal(got, expected)


def test_write_slots_takes_the_dtype_of_the_cache():
    buffer = jnp.zeros((1, K, S, H), jnp.bfloat16)
    got = write_slots(buffer, jnp.full((1, T, K, H), 1.001, jnp.float32), jnp.int32(2))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[:, :, 2:5].astype(jnp.float32), 1.0)


def test_rewind_only_shortens():
    cache = init_cache(CONFIGS["llama"], 3, S, jnp.float32)
    cache = cache.replace(lengths=jnp.array([5, 2, 0], jnp.int32))
    rewound = rewind_cache(cache, jnp.array([3, 4, 7], jnp.int32))
    np.testing.assert_array_equal(rewound.lengths, [3, 2, 0])
    for before, after in zip(cache.keys + cache.values, rewound.keys + rewound.values, strict=True):
        assert before is after


def test_gather_rows_reorders_and_forks_every_buffer():
    rng = np.random.default_rng(2)
    empty = init_cache(CONFIGS["llama"], 3, S, jnp.float32)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 99, x.shape).astype(x.dtype)), empty)
    rows = np.array([2, 0, 2, 1], np.int32)
    gathered = gather_rows(cache, jnp.asarray(rows))
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(gathered), strict=True):
        np.testing.assert_array_equal(after, np.asarray(before)[rows])


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, tokens, cache, start):
    return forward(config, params, tokens, cache, start)[1]


@st.composite
def edits(draw):
    """Per step and row: how many tokens to append (0 to CHUNK), then how many to take back."""
    row = st.tuples(st.integers(0, CHUNK), st.integers(0, CHUNK + 2))
    return draw(st.lists(st.tuples(*[row] * ROWS), min_size=1, max_size=12))


@settings(max_examples=40)
@given(steps=edits(), seed=st.integers(0, 2**32 - 1))
def test_contents_after_any_edits_equal_a_fresh_prefill(steps, seed):
    rng = np.random.default_rng(seed)
    config, params = CONFIGS["qwen3"], tiny("qwen3").params
    empty = init_cache(config, ROWS, TEXT + CHUNK, jnp.float32)
    cache, texts = empty, [[] for _ in range(ROWS)]
    for step in steps:
        lengths = np.array([len(text) for text in texts], np.int32)
        # What is past a row's own number of tokens is garbage that must not matter.
        tokens = rng.integers(0, config.vocab_size, (ROWS, CHUNK), np.int32)
        cache = run(config, params, tokens, cache, jnp.asarray(lengths))
        for text, new, (appended, _) in zip(texts, tokens, step, strict=True):
            text += new[: min(appended, TEXT - len(text))].tolist()
        cache = cache.replace(lengths=jnp.array([len(text) for text in texts], jnp.int32))
        for text, (_, taken_back) in zip(texts, step, strict=True):
            del text[max(0, len(text) - taken_back) :]
        cache = rewind_cache(cache, jnp.array([len(text) for text in texts], jnp.int32))
    survivors = np.zeros((ROWS, TEXT), np.int32)
    for row, text in enumerate(texts):
        survivors[row, : len(text)] = text
    fresh = run(config, params, survivors, empty, jnp.zeros(ROWS, jnp.int32))
    np.testing.assert_array_equal(cache.lengths, [len(text) for text in texts])
    for edited, expected in zip(cache.keys + cache.values, fresh.keys + fresh.values, strict=True):
        for row, text in enumerate(texts):
            np.testing.assert_allclose(
                edited[row, :, : len(text)], expected[row, :, : len(text)], rtol=1e-5, atol=1e-5
            )
