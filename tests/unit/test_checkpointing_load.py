"""Loading real Hugging Face folders: values, both config styles, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.checkpointing import load_checkpoint
from ssd_jax.checkpointing.hf_names import leaf_specs
from ssd_jax.checkpointing.inspect import describe
from ssd_jax.checkpointing.leaves import leaf_shapes, leaves_of
from ssd_jax.config import ModelConfig
from ssd_jax.errors import CheckpointError, ConfigError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir())


def read_tensors(folder):
    """All tensors of a folder, decoded by hand from the bytes of its files."""
    dtypes = {"F32": np.float32, "BF16": jnp.bfloat16}
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        contents = path.read_bytes()
        start = 8 + int.from_bytes(contents[:8], "little")
        header = json.loads(contents[8:start])
        header.pop("__metadata__", None)
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            values = np.frombuffer(contents[start + begin : start + end], dtypes[entry["dtype"]])
            tensors[key] = values.reshape(entry["shape"])
    return tensors


def edited(tmp_path, case="llama", **tensors):
    """A copy of a one-file fixture with tensors replaced, added, or removed (None)."""
    folder = tmp_path / case
    shutil.copytree(FIXTURES / case, folder)
    contents = read_tensors(folder)
    for key, value in tensors.items():
        contents.pop(key, None)
        if value is not None:
            contents[key] = value
    safetensors.numpy.save_file(contents, folder / "model.safetensors")
    return folder


def reassembled(case):
    """Leaves of a fixture, put together head by head, row by row, as types.py describes them."""
    tensors = read_tensors(FIXTURES / case)
    config = load_checkpoint(FIXTURES / case).config
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    group, leaves = n // k, {}
    for i in range(config.num_layers):
        hf = f"model.layers.{i}"
        projections = [tensors[f"{hf}.self_attn.{name}_proj.weight"] for name in "qkv"]
        qkv = np.zeros((config.hidden_size, k, group + 2, h), projections[0].dtype)
        biases = None
        if config.qkv_bias:
            biases = [tensors[f"{hf}.self_attn.{name}_proj.bias"] for name in "qkv"]
            bias = np.zeros((k, group + 2, h), qkv.dtype)
        for kv_head in range(k):
            heads = [(0, kv_head * group + g) for g in range(group)] + [(1, kv_head), (2, kv_head)]
            for slot, (which, head) in enumerate(heads):
                rows = slice(head * h, head * h + h)
                qkv[:, kv_head, slot] = projections[which][rows].T
                if biases:
                    bias[kv_head, slot] = biases[which][rows]
        leaves[f"layers.{i}.qkv"] = qkv
        if biases:
            leaves[f"layers.{i}.qkv_bias"] = bias
        output = np.zeros((k, group, h, config.hidden_size), qkv.dtype)
        for head in range(n):
            columns = tensors[f"{hf}.self_attn.o_proj.weight"][:, head * h : head * h + h]
            output[head // group, head % group] = columns.T
        leaves[f"layers.{i}.output"] = output
        gate, up = (tensors[f"{hf}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        leaves[f"layers.{i}.gate_up"] = np.stack([gate, up], axis=1)
        leaves[f"layers.{i}.down"] = tensors[f"{hf}.mlp.down_proj.weight"].T
        leaves[f"layers.{i}.attention_norm"] = tensors[f"{hf}.input_layernorm.weight"]
        leaves[f"layers.{i}.mlp_norm"] = tensors[f"{hf}.post_attention_layernorm.weight"]
        if config.qk_norm:
            leaves[f"layers.{i}.query_norm"] = tensors[f"{hf}.self_attn.q_norm.weight"]
            leaves[f"layers.{i}.key_norm"] = tensors[f"{hf}.self_attn.k_norm.weight"]
        if config.output_bias:
            leaves[f"layers.{i}.output_bias"] = tensors[f"{hf}.self_attn.o_proj.bias"]
        if config.mlp_bias:
            gate, up = (tensors[f"{hf}.mlp.{name}_proj.bias"] for name in ("gate", "up"))
            leaves[f"layers.{i}.gate_up_bias"] = np.stack([gate, up])
            leaves[f"layers.{i}.down_bias"] = tensors[f"{hf}.mlp.down_proj.bias"]
    leaves["embedding"] = tensors["model.embed_tokens.weight"]
    leaves["final_norm"] = tensors["model.norm.weight"]
    if not config.tied_embeddings:
        leaves["lm_head"] = tensors["lm_head.weight"].T
    return leaves


def assert_same_leaves(left, right):
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype, name
        assert np.array_equal(np.asarray(leaf), np.asarray(right[name])), name


@pytest.mark.parametrize("case", CASES)
def test_fixture_loads_with_every_value_in_its_place(case):
    loaded = load_checkpoint(FIXTURES / case)
    leaves = leaves_of(loaded.params)
    assert {name: leaf.shape for name, leaf in leaves.items()} == leaf_shapes(loaded.config)
    assert_same_leaves(leaves, reassembled(case))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    assert sum(leaf.size for leaf in leaves.values()) == loaded.config.num_params
    assert loaded.dtype == (jnp.bfloat16 if case.endswith("bf16") else np.float32)
    assert loaded.tokenizer_folder == FIXTURES / case


@pytest.mark.parametrize("case", CASES)
def test_older_config_style_gives_the_same_model(case, tmp_path):
    folder = tmp_path / case
    shutil.copytree(FIXTURES / case, folder)
    shutil.move(folder / "config_v4.json", folder / "config.json")
    new, old = load_checkpoint(FIXTURES / case), load_checkpoint(folder)
    assert old.config == new.config
    assert_same_leaves(leaves_of(old.params), leaves_of(new.params))


@given(
    k=st.integers(1, 3),
    g=st.integers(1, 3),
    h=st.sampled_from([2, 4]),
    biased=st.booleans(),
    tied=st.booleans(),
    normed=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_pieces_cover_every_element_of_every_leaf_once(k, g, h, biased, tied, normed):
    config = ModelConfig(
        family="llama",
        vocab_size=7,
        hidden_size=5,
        intermediate_size=3,
        num_layers=2,
        num_heads=k * g,
        num_kv_heads=k,
        head_dim=h,
        max_context=8,
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        qk_norm=normed,
        tied_embeddings=tied,
    )
    keys = []
    for spec in leaf_specs(config):
        writes = np.zeros(spec.shape, int)
        for piece in spec.pieces:
            view = piece.view(writes)
            view += 1
            assert view.size == np.prod(piece.tensor_shape(spec.shape))
            keys.append(piece.key)
        assert (writes == 1).all(), spec.name
    assert len(keys) == len(set(keys))


def test_float32_to_bfloat16_and_back_follow_the_dtype_asked_for():
    exact = leaves_of(load_checkpoint(FIXTURES / "llama").params)
    rounded = load_checkpoint(FIXTURES / "llama", "bfloat16")
    assert rounded.dtype == jnp.bfloat16
    expected = {name: leaf.astype(jnp.bfloat16) for name, leaf in exact.items()}
    assert_same_leaves(leaves_of(rounded.params), expected)
    stored = leaves_of(load_checkpoint(FIXTURES / "qwen3_bf16").params)
    widened = leaves_of(load_checkpoint(FIXTURES / "qwen3_bf16", "float32").params)
    assert_same_leaves(widened, {name: leaf.astype(np.float32) for name, leaf in stored.items()})


def test_float16_is_widened_to_float32(tmp_path):
    half = {
        key: value.astype(np.float16) for key, value in read_tensors(FIXTURES / "llama").items()
    }
    loaded = load_checkpoint(edited(tmp_path, **half))
    assert loaded.dtype == np.float32
    embedding = half["model.embed_tokens.weight"].astype(np.float32)
    assert np.array_equal(np.asarray(loaded.params.embedding), embedding)


@pytest.mark.parametrize("dtype", ["float16", "int8", "nonsense"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(CheckpointError, match=dtype):
        load_checkpoint(FIXTURES / "llama", dtype)


def test_large_tensors_are_read_in_several_blocks(monkeypatch):
    whole = leaves_of(load_checkpoint(FIXTURES / "llama_mha").params)
    monkeypatch.setattr("ssd_jax.checkpointing.hf_loader._BLOCK_BYTES", 900)
    assert_same_leaves(leaves_of(load_checkpoint(FIXTURES / "llama_mha").params), whole)


def test_all_problems_are_listed_together(tmp_path):
    tensors = read_tensors(FIXTURES / "llama")
    poisoned = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    poisoned[-1, -1] = np.nan
    changes = {
        "model.layers.0.mlp.gate_proj.weight": None,
        "model.layers.0.self_attn.o_proj.weight": tensors["model.norm.weight"],
        "model.layers.1.mlp.up_proj.weight": poisoned,
        "model.layers.1.input_layernorm.weight": np.ones(32, np.int32),
        "model.layers.7.extra": np.ones(3, np.float32),
    }
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(edited(tmp_path, **changes))
    message = str(caught.value)
    assert all(key in message for key in changes)
    kinds = ("missing", "unexpected", "of the wrong shape", "not floating point", "not finite")
    assert all(f"1 {kind}" in message for kind in kinds)
    assert "[32, 32], got [32]" in message
    text = describe(tmp_path / "llama")
    assert "problem" in text
    assert "model.layers.7.extra" in text


@pytest.mark.parametrize(("dtype", "refused"), [("float32", False), ("bfloat16", True)])
def test_values_that_overflow_the_dtype_are_not_finite(tmp_path, dtype, refused):
    norm = np.full(32, np.finfo(np.float32).max)
    folder = edited(tmp_path, **{"model.norm.weight": norm})
    if not refused:
        load_checkpoint(folder, dtype)
        return
    with pytest.raises(CheckpointError, match=r"not finite in bfloat16: model\.norm\.weight"):
        load_checkpoint(folder, dtype)


def test_redundant_output_matrix_of_a_tied_checkpoint_must_equal_the_embedding(tmp_path):
    embedding = read_tensors(FIXTURES / "llama31")["model.embed_tokens.weight"]
    same = edited(tmp_path / "same", "llama31", **{"lm_head.weight": embedding})
    assert load_checkpoint(same).params.lm_head is None
    other = edited(tmp_path / "other", "llama31", **{"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"tied: lm_head\.weight"):
        load_checkpoint(other)
    small = edited(tmp_path / "small", "llama31", **{"lm_head.weight": embedding[1:]})
    with pytest.raises(CheckpointError, match=r"wrong shape: lm_head\.weight"):
        load_checkpoint(small)


def test_rotary_tables_of_old_files_are_ignored(tmp_path):
    tables = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float16) for i in range(2)
    }
    loaded = load_checkpoint(edited(tmp_path, "qwen3_bf16", **tables))
    assert loaded.dtype == jnp.bfloat16


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_file_is_refused(tmp_path, keep):
    folder = edited(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors, but it is damaged or truncated"
    ):
        load_checkpoint(folder)


def test_corrupt_header_is_refused(tmp_path):
    folder = edited(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(folder)


def test_absent_shards_are_named(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(FIXTURES / "qwen2_5_sharded", folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is not there"):
        load_checkpoint(folder)


def test_tensor_in_two_shards_is_refused(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(FIXTURES / "qwen2_5_sharded", folder)
    first = folder / "model-00001-of-00002.safetensors"
    shutil.copy(first, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"got model\..* in both"):
        load_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../elsewhere.safetensors"}, {"a": 3}])
def test_senseless_index_is_refused(tmp_path, weight_map):
    folder = edited(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load_checkpoint(folder)


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"found none at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="found neither"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin; save"):
        load_checkpoint(tmp_path)
    shutil.copy(FIXTURES / "llama" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"Expected JSON in .*config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="got a list"):
        load_checkpoint(tmp_path)


def test_hugging_face_folder_loads_without_importing_orbax():
    program = (
        "import sys; from pathlib import Path; from ssd_jax.checkpointing import load_checkpoint;"
        "load_checkpoint(Path(sys.argv[1])); sys.exit('orbax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(FIXTURES / "llama")], check=True)


def renamed(tmp_path, case, rename):
    """A copy of a one-file fixture with every tensor under another name."""
    tensors = read_tensors(FIXTURES / case)
    folder = edited(tmp_path, case, **dict.fromkeys(tensors))
    contents = {rename(key): value for key, value in tensors.items()}
    safetensors.numpy.save_file(contents, folder / "model.safetensors")
    return folder


def compiled(key):
    return key.replace("model.layers.", "_orig_mod.model.layers._orig_mod.")


RENAMED = {
    "compiled": lambda key: "_orig_mod." + key,
    "compiled by layer": compiled,
    "data parallel": lambda key: "module." + key,
    "both": lambda key: "module._orig_mod." + key,
    "base model": lambda key: key.removeprefix("model."),
    "compiled base model": lambda key: "_orig_mod." + key.removeprefix("model."),
}


@pytest.mark.parametrize("case", ["llama", "qwen3"])
@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_names_of_wrapped_and_of_base_models(tmp_path, case, rename):
    loaded = load_checkpoint(renamed(tmp_path, case, rename))
    assert_same_leaves(leaves_of(loaded.params), leaves_of(load_checkpoint(FIXTURES / case).params))
    assert loaded.dtype == load_checkpoint(FIXTURES / case).dtype


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "_orig_mod.model.rotary_emb.inv_freq",
    ],
)
def test_tables_of_rope_are_not_weights(tmp_path, name):
    folder = edited(tmp_path, **{name: np.ones(4, np.float32)})
    loaded = load_checkpoint(folder)
    assert_same_leaves(
        leaves_of(loaded.params), leaves_of(load_checkpoint(FIXTURES / "llama").params)
    )


def test_two_names_of_one_tensor_are_both_told(tmp_path):
    name = "_orig_mod.model.norm.weight"
    folder = edited(tmp_path, **{name: np.ones(32, np.float32)})
    with pytest.raises(CheckpointError, match=r"_orig_mod\.model\.norm.*both mean 'model\.norm"):
        load_checkpoint(folder)


def with_config(tmp_path, **changes):
    """A copy of a fixture with fields of its config.json changed."""
    folder = edited(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("layers", [20_000, 2**31 - 1])
def test_layers_are_counted_in_the_file_before_any_table_is_built(tmp_path, layers):
    folder = with_config(tmp_path, num_hidden_layers=layers)
    for read in (load_checkpoint, describe):
        with pytest.raises(CheckpointError, match=f"{layers} layers.*num_hidden_layers"):
            read(folder)


def test_an_unsupported_config_names_its_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"In .*llama: rope_theta .*inf"):
        load_checkpoint(with_config(tmp_path, rope_theta=float("inf")))


DEEP = [b"[" * 10**5, b'{"a":' * 10**5, b'{"a":' * 100 + b"1" + b"}" * 100]


@pytest.mark.parametrize("contents", [*DEEP, b'{"vocab_size": ' + b"9" * 5000 + b"}", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_read_names_its_file(tmp_path, name, contents):
    folder = tmp_path / "qwen2_5_sharded"
    shutil.copytree(FIXTURES / "qwen2_5_sharded", folder)
    (folder / name).write_bytes(contents)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "values",
    [[["x"]], [{}], [None], [5], ["a" * 5000], ["../x"], ["x" * 200 + str(i) for i in range(99)]],
)
def test_wrong_kinds_in_the_index_are_told(tmp_path, values):
    folder = tmp_path / "qwen2_5_sharded"
    shutil.copytree(FIXTURES / "qwen2_5_sharded", folder)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] |= {f"tensor{i}": value for i, value in enumerate(values)}
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 1000


def test_long_names_of_tensors_are_shortened(tmp_path):
    names = {"x" * 5000 + str(i): np.ones(2, np.float32) for i in range(9)}
    with pytest.raises(CheckpointError, match="9 unexpected") as caught:
        load_checkpoint(edited(tmp_path, **names))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("path", ["x" * 5000, "/".join(["y" * 100] * 50)])
@pytest.mark.parametrize("function", [load_checkpoint, describe])
def test_a_path_of_5000_characters(function, path):
    with pytest.raises(CheckpointError, match="checkpoint folder, found none") as caught:
        function(Path(path))
    assert len(str(caught.value)) < 500


def test_a_pipe_is_no_config(tmp_path):
    folder = edited(tmp_path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(folder)
