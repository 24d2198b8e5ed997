"""A tiny random Llama with a tokenizer of printable ASCII, and `main` run in this process."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ssd_jax.cli import busy
from ssd_jax.cli.main import main

VOCAB_SIZE = 128
CONTEXT = 16384
HIDDEN, HEAD_DIM, MLP = 32, 8, 64
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A Hugging Face folder without a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": MLP,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    layer = {
        "self_attn.q_proj": (2 * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 2 * HEAD_DIM),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.embed_tokens.weight"] = (VOCAB_SIZE, HIDDEN)
    weights = {
        name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }
    for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        weights[f"model.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    save_file(weights, folder / "model.safetensors")
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def chat_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The same weights with a chat template and a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(tiny_checkpoint / name)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, jax_settings, tmp_path_factory):
    """Runs a command line in this process: `run(*argv, stdin=..., VARIABLE=...)`.

    Programs go to the cache that the test run has, if any, other things to an empty one. That
    something takes long is not said, however slow the machine.
    """
    monkeypatch.setattr(busy, "LINE_DELAY_S", 10**6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
    cache = jax.config.jax_compilation_cache_dir or "off"

    def run(*argv, stdin=b"", **variables):
        for name, value in {"SSD_JAX_COMPILATION_CACHE": cache, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Outcome(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def generate(run, tiny_checkpoint):
    """`ssd-jax generate` with the tiny model, 12 tokens unless told otherwise."""
    return lambda *argv, **options: run(
        "generate", "--model", tiny_checkpoint, "--max-tokens", "12", *argv, **options
    )


@pytest.fixture
def jax_settings():
    """JAX's cache settings are what they were when the test is over."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def _tokenizer():
    """One token a printable character (every id gives text), after an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<eos>"],
        initial_alphabet=[*printable, "Ġ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog sat on the mat in the rain"] * 3, trainer)
    return tokenizer
