"""The decoder against transformers' own numbers, family by family and module by module."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ssd_jax.checkpointing.hf_loader import open_hf_checkpoint, read_hf_params
from ssd_jax.config import model_config_from_hf
from ssd_jax.generation import generate
from ssd_jax.kv_cache import init_cache
from ssd_jax.model import Model
from ssd_jax.models import decoder
from ssd_jax.models.rope import rope_angles
from ssd_jax.sampling_params import SamplingParams

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(folder.name for folder in FIXTURES.iterdir())
NUM_PROMPTS, PADDED_LENGTH, GREEDY_STEPS, ROPE_POSITIONS = 3, 24, 64, 64
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(model, expected arrays) of one fixture, weights widened to float32."""
    checkpoint = open_hf_checkpoint(FIXTURES / request.param)
    params = read_hf_params(checkpoint, np.dtype("float32"))
    expected = load_file(FIXTURES / request.param / "expected.safetensors")
    return Model(config=checkpoint.config, params=params, tokenizer=None), expected


def relative_error(got, expected):
    """The largest deviation in any vector (last axis), over that vector's largest element."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    return np.max(np.abs(got - expected).max(axis=-1) / np.abs(expected).max(axis=-1))


def test_every_case_of_the_readme_is_there():
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    assert len(CASES) == 8
    for name in CASES:
        assert f"`{name}`" in readme


@pytest.mark.parametrize("name", CASES)
def test_both_config_layouts_mean_the_same(name):
    new, old = (
        model_config_from_hf(json.loads((FIXTURES / name / file).read_text(encoding="utf-8")))
        for file in ("config.json", "config_v4.json")
    )
    assert new == old
    assert hash(new) == hash(old)


@functools.partial(jax.jit, static_argnames="config")
def all_logits(config, params, tokens):
    cache = init_cache(config, *tokens.shape, jnp.float32)
    hidden, _ = decoder.forward(config, params, tokens, cache, jnp.int32(0))
    return decoder.compute_logits(params, hidden)


def test_logits_of_every_position(case):
    model, expected = case
    prompts = [expected[f"prompt_{row}"] for row in range(NUM_PROMPTS)]
    tokens = np.zeros((NUM_PROMPTS, PADDED_LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits = all_logits(model.config, model.params, tokens)
    for row, prompt in enumerate(prompts):
        assert relative_error(logits[row, : len(prompt)], expected[f"logits_{row}"]) < TOLERANCE


def test_greedy_tokens_of_a_ragged_batch_and_of_one_row(case):
    model, expected = case
    prompts = [expected[f"prompt_{row}"].tolist() for row in range(NUM_PROMPTS)]
    greedy = SamplingParams(max_tokens=GREEDY_STEPS)
    together = generate(model, prompts, greedy)
    np.testing.assert_array_equal([row.token_ids for row in together], expected["greedy_ids"])
    alone = generate(model, prompts[1:2], greedy)
    np.testing.assert_array_equal(alone[0].token_ids, expected["greedy_ids"][1])


@functools.partial(jax.jit, static_argnames="config")
def modules(config, params, tokens):
    """What every module of the decoder gives, under the fixture's names, without the batch axis."""
    out = {}
    start = jnp.int32(0)
    cache = init_cache(config, *tokens.shape, jnp.float32)
    cos, sin = rope_angles(config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])
    out["embed"] = x = params.embedding[tokens]
    for index, layer in enumerate(params.layers):
        name = f"layer_{index}"
        norm = functools.partial(decoder.rms_norm, eps=config.rms_norm_eps)
        out[f"{name}.input_norm"] = norm(x, layer.attention_norm)
        query, key, _ = decoder.project_qkv(config, layer, x, cos, sin)
        out[f"{name}.q"], out[f"{name}.k"] = query, key
        keys, values = cache.keys[index], cache.values[index]
        attended = decoder.attention_block(config, layer, x, keys, values, start, cos, sin)[0]
        out[f"{name}.attn_out"] = attended
        x = x + attended
        out[f"{name}.post_norm"] = norm(x, layer.mlp_norm)
        out[f"{name}.mlp_out"] = mlp = decoder.mlp_block(config, layer, x)
        out[f"{name}.out"] = x = x + mlp
    out["final_norm"], _ = decoder.forward(config, params, tokens, cache, start)
    return {name: value[0] for name, value in out.items()}


def test_every_module(case):
    model, expected = case
    got = modules(model.config, model.params, expected["probe_ids"][None])
    layers = [name for name in expected if name.startswith("layer_")]
    assert set(got) == {"embed", "final_norm", *layers}
    assert len(layers) == 7 * model.config.num_layers
    errors = {name: relative_error(got[name], expected[name]) for name in got}
    assert {name: error for name, error in errors.items() if error >= TOLERANCE} == {}


def test_rope_tables(case):
    model, expected = case
    positions = jnp.arange(ROPE_POSITIONS, dtype=jnp.int32)[None]
    half = model.config.head_dim // 2
    tables = zip(rope_angles(model.config, positions), ("rope_cos", "rope_sin"), strict=True)
    for table, name in tables:
        np.testing.assert_allclose(table[0, :, :half], expected[name], atol=2e-5)
        np.testing.assert_array_equal(table[0, :, half:], table[0, :, :half])
