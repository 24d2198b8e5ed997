"""Exporting to the Hugging Face layout is the inverse of loading from it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from ssd_jax.checkpointing import describe, export_hf, load_checkpoint, partial_folder
from ssd_jax.checkpointing.exchange import exchange_names
from ssd_jax.checkpointing.leaves import leaf_shapes, leaves_of, params_from_leaves
from ssd_jax.config import ModelConfig, RopeScaling
from ssd_jax.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir())
CONFIG = ModelConfig(
    family="llama",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    max_context=16,
)


def random_params(config, seed, dtype):
    generator = np.random.default_rng(seed)
    leaves = {
        name: jnp.asarray(generator.standard_normal(shape), dtype)
        for name, shape in leaf_shapes(config).items()
    }
    return params_from_leaves(config, leaves)


def source_tensors(folder):
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_export_gives_back_the_tensors_that_were_loaded(case, tmp_path):
    loaded = load_checkpoint(FIXTURES / case)
    export_hf(loaded.config, loaded.params, tmp_path)
    written, source = source_tensors(tmp_path), source_tensors(FIXTURES / case)
    assert written.keys() == source.keys()
    for key, tensor in source.items():
        assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape)
        assert written[key].tobytes() == tensor.tobytes(), key
    again = load_checkpoint(tmp_path)
    assert again.config == loaded.config
    leaves = leaves_of(loaded.params)
    for name, leaf in leaves_of(again.params).items():
        assert np.array_equal(np.asarray(leaf), np.asarray(leaves[name])), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("case", CASES)
def test_exported_config_agrees_with_that_of_transformers(case, tmp_path):
    loaded = load_checkpoint(FIXTURES / case)
    export_hf(loaded.config, loaded.params, tmp_path, extra_config={"eos_token_id": [2, 3]})
    written = json.loads((tmp_path / "config.json").read_text())
    reference = json.loads((FIXTURES / case / "config_v4.json").read_text())
    names = set(written) & set(reference) - {"eos_token_id"}
    scaling = reference["rope_scaling"]
    if scaling is not None:  # one of its fields may go by two names
        assert written["rope_scaling"].items() >= scaling.items()
        names.remove("rope_scaling")
    assert {name: written[name] for name in names} == {name: reference[name] for name in names}
    essential = {"architectures", "model_type", "torch_dtype", "rope_theta", "tie_word_embeddings"}
    assert essential <= names
    assert written["eos_token_id"] == [2, 3]


@pytest.mark.parametrize("scaling", [None, RopeScaling(kind="linear", factor=2.0)])
def test_export_of_random_weights(scaling, tmp_path):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    params = random_params(config, 0, jnp.bfloat16)
    export_hf(config, params, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == config
    assert np.array_equal(loaded.params.lm_head, params.lm_head)


def test_export_keeps_other_files_and_replaces_its_own(tmp_path):
    (tmp_path / "tokenizer.json").write_text("kept")
    (tmp_path / "link").symlink_to("tokenizer.json")
    (tmp_path / "notes" / "old").mkdir(parents=True)
    (tmp_path / "notes" / "old" / "a.txt").write_text("kept too")
    for seed in (0, 1):
        params = random_params(CONFIG, seed, jnp.float32)
        export_hf(CONFIG, params, tmp_path)
    assert np.array_equal(load_checkpoint(tmp_path).params.embedding, params.embedding)
    assert (tmp_path / "tokenizer.json").read_text() == "kept"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "notes" / "old" / "a.txt").read_text() == "kept too"
    assert not list(tmp_path.parent.glob(".*.partial-*"))
    assert "unusable" in describe(tmp_path)


@pytest.mark.parametrize(
    "change", [{"qkv_bias": True}, {"qk_norm": True}, {"family": "qwen2", "mlp_bias": True}]
)
def test_models_that_no_family_has_are_refused(change, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(CheckpointError, match=r"config\.json can describe"):
        export_hf(config, random_params(config, 0, jnp.float32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_export_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    params = random_params(CONFIG, 0, jnp.float32)
    export_hf(CONFIG, params, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(partial_folder, "exchange_names", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        export_hf(CONFIG, random_params(CONFIG, 1, jnp.float32), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    shutil.rmtree(tmp_path)


def test_weights_and_config_are_replaced_together(tmp_path, monkeypatch):
    export_hf(CONFIG, random_params(CONFIG, 0, jnp.float32), tmp_path / "out")
    config = dataclasses.replace(CONFIG, rope_theta=77.0)
    params = random_params(config, 1, jnp.float32)
    seen = []

    def look(one, other):
        seen.extend((load_checkpoint(one), load_checkpoint(other)))
        return exchange_names(one, other)

    monkeypatch.setattr(partial_folder, "exchange_names", look)
    export_hf(config, params, tmp_path / "out")
    new, old = seen
    assert (new.config, old.config) == (config, CONFIG)
    assert np.array_equal(new.params.embedding, params.embedding)
    assert load_checkpoint(tmp_path / "out").config == config


def test_the_users_umask_decides_who_may_read(tmp_path):
    loaded = load_checkpoint(FIXTURES / "llama")
    export_hf(loaded.config, loaded.params, tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
