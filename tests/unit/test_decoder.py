import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, FAMILY_NAMES, prompt_ids, reference_frequencies, tiny

from ssd_jax.kv_cache import init_cache
from ssd_jax.models.decoder import compute_logits, forward, rms_norm
from ssd_jax.models.rope import apply_rope, inverse_frequencies, rope_angles

TEXT, SLOTS = 24, 32
FLOAT32_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # the logits' spread is about 3


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, tokens, cache, start):
    hidden, cache = forward(config, params, tokens, cache, start)
    return compute_logits(params, hidden), cache


def feed(name, texts, chunk, dtype=jnp.float32):
    """Logits [B, T, V] of texts [B, T], fed in chunks with one start for each row."""
    config = CONFIGS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny(name).params)
    texts = np.asarray(texts, np.int32)
    cache = init_cache(config, len(texts), SLOTS, dtype)
    parts = []
    for start in range(0, texts.shape[1], chunk):
        starts = jnp.full(len(texts), start, jnp.int32)
        logits, cache = run(config, params, texts[:, start : start + chunk], cache, starts)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_any_way_of_feeding_gives_the_reference_logits(name):
    text = prompt_ids(TEXT)
    expected = tiny(name).logits(text)
    assert expected.std() > 1  # otherwise the comparison would mean little
    for chunk in (TEXT, 8, 1):
        np.testing.assert_allclose(feed(name, [text], chunk)[0], expected, **FLOAT32_TOLERANCE)


def test_one_start_for_all_rows_is_the_same_as_one_each():
    config, params = CONFIGS["qwen2"], tiny("qwen2").params
    texts = np.array([prompt_ids(8, seed) for seed in range(2)], np.int32)
    cache = init_cache(config, 2, SLOTS, jnp.float32)
    one, filled = run(config, params, texts, cache, jnp.int32(0))
    each, also_filled = run(config, params, texts, cache, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(one, each, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(filled.keys[1], also_filled.keys[1], rtol=1e-6, atol=1e-6)


def test_rows_at_different_lengths_do_not_mix():
    name = "llama3_rope"
    config, params = CONFIGS[name], tiny(name).params
    texts = [prompt_ids(16, 1), prompt_ids(21, 2)]
    cache = init_cache(config, 2, SLOTS, jnp.float32)
    padded = np.zeros((2, TEXT), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text) - 1] = text[:-1]
    _, cache = run(config, params, padded, cache, jnp.int32(0))
    last = np.array([text[-1:] for text in texts], np.int32)
    logits, _ = run(config, params, last, cache, jnp.array([15, 20], jnp.int32))
    for row, text in enumerate(texts):
        np.testing.assert_allclose(logits[row, 0], tiny(name).logits(text)[-1], **FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_and_padding_change_no_bit(dtype):
    text, first, second = (prompt_ids(16, seed) for seed in range(3))
    kept = feed("qwen3", [text, first], 16, dtype)[0]
    np.testing.assert_array_equal(feed("qwen3", [text, second], 16, dtype)[0], kept)
    np.testing.assert_array_equal(feed("qwen3", [second, text], 16, dtype)[1], kept)
    shorter = feed("qwen3", [text[:9] + first[9:], second], 16, dtype)[0]
    np.testing.assert_array_equal(shorter[:9], kept[:9])


def test_garbage_past_a_row_changes_no_bit():
    config, params = CONFIGS["qwen3"], tiny("qwen3").params
    tokens = np.array([[3]], np.int32)
    start = jnp.array([5], jnp.int32)
    clean = init_cache(config, 1, SLOTS, jnp.float32)
    dirty = jax.tree.map(lambda x: x + 1000 if x.ndim == 4 else x, clean)
    dirty = dirty.replace(
        keys=tuple(x.at[:, :, :5].set(0.0) for x in dirty.keys),
        values=tuple(x.at[:, :, :5].set(0.0) for x in dirty.values),
    )
    np.testing.assert_array_equal(
        run(config, params, tokens, dirty, start)[0], run(config, params, tokens, clean, start)[0]
    )


def test_the_batch_size_hardly_matters():
    texts = [prompt_ids(16, seed) for seed in range(4)]
    together = feed("qwen2", texts, 16)
    for row, text in enumerate(texts):
        alone = feed("qwen2", [text], 16)[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_bfloat16_is_near_float32(name):
    text = prompt_ids(TEXT)
    wide, low = feed(name, [text], TEXT), feed(name, [text], TEXT, jnp.bfloat16)
    assert low.dtype == np.float32
    assert np.sqrt(np.mean((low - wide) ** 2)) < 0.05 * wide.std()


def test_decoding_one_bfloat16_row_gives_what_two_rows_give():
    text = prompt_ids(8)
    np.testing.assert_allclose(
        feed("qwen2", [text], 1, jnp.bfloat16)[0],
        feed("qwen2", [text, text], 1, jnp.bfloat16)[0],
        rtol=0.02,
        atol=0.02,
    )


def test_rms_norm_keeps_small_and_large_bfloat16_rows():
    rows = np.array([[1e-3, -2e-3], [300.0, 400.0]], np.float32)
    scale = np.array([1.0, 2.0], np.float32)
    got = rms_norm(jnp.asarray(rows, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16), 1e-12)
    expected = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True)) * scale
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0.01)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_frequencies(name):
    np.testing.assert_allclose(
        inverse_frequencies(CONFIGS[name]), reference_frequencies(CONFIGS[name]), rtol=1e-6
    )


def test_llama3_scaling_has_all_three_bands():
    config = CONFIGS["llama3_rope"]
    plain = config.rope_theta ** -(np.arange(4) / 4)
    ratio = inverse_frequencies(config) / plain
    assert ratio[0] == pytest.approx(1, rel=1e-6)
    assert 0.2 < ratio[1] < 0.9
    assert ratio[-1] == pytest.approx(1 / 8, rel=1e-6)


def test_rope_depends_on_distance_alone_even_far_out():
    config = CONFIGS["llama"]
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 1, 1, 1, config.head_dim), np.float32)

    def score(query_position, key_position):
        rotated = []
        for heads, position in ((query, query_position), (key, key_position)):
            cos, sin = rope_angles(config, jnp.array([[position]], jnp.int32))
            rotated.append(np.asarray(apply_rope(jnp.asarray(heads), cos, sin), np.float64))
        return (rotated[0] * rotated[1]).sum()

    for distance in (0, 1, 7):
        near = score(distance, 0)
        for key_position in (300, 1000, 30_000):
            assert score(key_position + distance, key_position) == pytest.approx(near, abs=2e-2)
    assert abs(score(1, 0) - score(0, 0)) > 0.05
