"""GGUF layout against independent references, and llama.cpp's peer on a server that is a stub."""

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CONFIGS, FAMILY_NAMES, tiny

from bench.peers.gguf_layout import (
    gguf_name,
    gguf_tensor,
    ids_only_fields,
    model_fields,
    pair_neighbours,
    rope_factors,
    splitter_name,
    tokenizer_fields,
)
from bench.peers.llama_cpp_peer import LlamaCpp, server_command
from bench.peers.protocol import Load, PeerFailure, Run
from ssd_jax.checkpointing.export import hf_config, hf_tensors
from ssd_jax.model import demo_folder
from ssd_jax.models.rope import inverse_frequencies

LOAD = Load(target="t.gguf", draft="d.gguf", dtype="float32", threads=3, context=512)
SERVER = """
    import json, os, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    if sys.argv[1] == "--version":
        sys.exit("version: 7 (stub)")
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    with open(os.path.join(os.path.dirname(__file__), "starts"), "a") as starts:
        print(json.dumps(arguments), file=starts)
    if arguments["--model"] == "bad.gguf":
        sys.exit("no such model")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *parts):
            pass

        def do_GET(self):
            self.answer(200, {"status": "ok"})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["prompt"] == [0]:
                return self.answer(400, {"error": "prompt too short"})
            tokens = [sum(body["prompt"])] * body["n_predict"]
            self.answer(200, {"tokens": tokens, "content": "text", "timings": {
                "prompt_ms": 20.0, "predicted_ms": 500.0, "draft_n": 9, "draft_n_accepted": 6}})

        def answer(self, code, value):
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
"""


def request(mode, prompt=(1, 2), **options):
    return Run(mode=mode, options=options, prompt=list(prompt), max_tokens=4)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "llama-server"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(SERVER))
    path.chmod(0o755)
    return path


@pytest.fixture
def peer(program):
    peer = LlamaCpp(str(program))
    yield peer
    peer.close()


def starts(program):
    return [json.loads(line) for line in (program.parent / "starts").read_text().splitlines()]


def test_a_server_is_started_once_a_mode_and_its_own_times_are_taken(peer, program):
    assert peer.load(LOAD).versions == {"llama.cpp": "version: 7 (stub)"}
    for _ in range(2):
        answer = peer.run(request("plain"))
        peer.run(request("draft", k="5"))
    assert answer.tokens == [3, 3, 3, 3]
    assert (answer.first_s, answer.decode_s, answer.decode_tokens) == (0.02, 0.5, 3)
    assert (answer.drafted, answer.accepted) == (9, 6)
    plain, draft = starts(program)
    assert plain["--model"] == draft["--model"] == "t.gguf"
    assert plain["--threads"] == draft["--spec-draft-threads"] == "3"
    assert "--spec-type" not in plain
    assert (draft["--spec-draft-model"], draft["--spec-draft-n-max"]) == ("d.gguf", "5")


def test_modes_that_remember_get_a_new_server_for_each_answer(peer, program):
    peer.load(LOAD)
    for _ in range(3):
        peer.run(request("ngram-mod", n="4"))
    assert [start["--spec-ngram-mod-n-match"] for start in starts(program)] == ["4"] * 3


def test_a_server_that_refuses_or_ends_is_quoted(peer):
    peer.load(LOAD)
    with pytest.raises(PeerFailure, match="prompt too short"):
        peer.run(request("plain", prompt=[0]))
    peer.load(Load(target="bad.gguf", draft=None, dtype="float32", threads=1, context=64))
    with pytest.raises(PeerFailure, match="ended with code 1 before it was ready"):
        peer.run(request("plain"))


def test_a_program_that_does_not_run_is_named(tmp_path):
    with pytest.raises(PeerFailure, match="absent does not run"):
        LlamaCpp(str(tmp_path / "absent")).load(LOAD)


def test_float32_asks_for_exact_attention_and_caches():
    exact = server_command("s", LOAD, request("draft"))
    for flag in ("--cache-type-k", "--cache-type-v", "--spec-draft-type-k", "--spec-draft-type-v"):
        assert exact[exact.index(flag) + 1] == "f32"
    assert exact[exact.index("--flash-attn") + 1] == "off"
    half = Load(target="t", draft="d", dtype="bfloat16", threads=1, context=64)
    assert "--flash-attn" not in server_command("s", half, request("draft"))


@pytest.mark.parametrize(
    ("mode", "options", "complaint"),
    [
        ("chess", {}, "'chess'"),
        ("plain", {"k": "1"}, "'k'"),
        ("draft", {"k": "x"}, "'x'"),
        ("ngram-simple", {"min": "1"}, "n, max, hits"),
    ],
)
def test_unknown_modes_and_options_are_refused(mode, options, complaint):
    with pytest.raises(PeerFailure, match=complaint):
        server_command("s", LOAD, request(mode, **options))


def test_n_grams_and_a_draft_model_go_together():
    command = server_command("s", LOAD, request("combined", k="3", n="4", max="9"))
    for flag, value in (
        ("--spec-type", "ngram-simple,draft-simple"),
        ("--spec-draft-model", "d.gguf"),
        ("--spec-draft-n-max", "3"),
        ("--spec-ngram-simple-size-n", "4"),
        ("--spec-ngram-simple-size-m", "9"),
    ):
        assert command[command.index(flag) + 1] == value


def test_drafting_without_a_draft_is_refused():
    load = Load(target="t", draft=None, dtype="float32", threads=1, context=64)
    with pytest.raises(PeerFailure, match="needs a draft model"):
        server_command("s", load, request("draft"))


def raw_config(name):
    return hf_config(CONFIGS[name], np.dtype(np.float32))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_tensor_of_a_family_has_a_place_of_its_own(name):
    config = CONFIGS[name]
    tensors = hf_tensors(config, tiny(name).params)
    names = {gguf_name(key) for key in tensors}
    assert len(names) == len(tensors)
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_q.weight"} <= names
    assert ("output.weight" in names) != config.tied_embeddings
    for key, tensor in tensors.items():
        moved = gguf_tensor(raw_config(name), key, tensor)
        assert moved.shape == tensor.shape
        is_permuted = config.family == "llama" and ("q_proj" in key or "k_proj" in key)
        assert is_permuted != np.array_equal(moved, tensor)


def test_unknown_tensors_have_no_place():
    for key in ("model.layers.0.mlp.router.weight", "model.layers.0.mlp.up_proj.scale", "x"):
        with pytest.raises(KeyError):
            gguf_name(key)


def rotate_halves(head, angles):
    """Hugging Face: row i with row i + H/2."""
    first, second = np.split(head, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def rotate_neighbours(head, angles):
    """llama.cpp: row 2i with row 2i + 1."""
    turned = (head[0::2] + 1j * head[1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(-1)


def test_scores_of_permuted_projections_are_those_of_the_originals():
    random = np.random.default_rng(0)
    heads, head_dim, hidden = 3, 8, 5
    query, key = random.standard_normal((2, heads * head_dim, hidden))
    x, y = random.standard_normal((2, hidden))
    at, to = random.standard_normal((2, head_dim // 2))
    moved_query, moved_key = (pair_neighbours(matrix, heads) for matrix in (query, key))
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        one = rotate_halves(query[rows] @ x, at) @ rotate_halves(key[rows] @ y, to)
        other = rotate_neighbours(moved_query[rows] @ x, at) @ rotate_neighbours(
            moved_key[rows] @ y, to
        )
        assert one == pytest.approx(other)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_rope_fields_give_our_frequencies(name):
    config, raw = CONFIGS[name], raw_config(name)
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    factors = rope_factors(raw)
    assert (factors is not None) == (name == "llama3_rope")
    frequencies = plain if factors is None else plain / factors
    np.testing.assert_allclose(frequencies, inverse_frequencies(config), rtol=1e-6)
    fields = model_fields(raw)
    assert fields[f"{config.family}.rope.freq_base"][1] == config.rope_theta
    assert fields[f"{config.family}.attention.head_count_kv"][1] == config.num_kv_heads


def read(path: Path):
    return json.loads(path.read_text())


def test_the_demo_tokenizer_is_written_token_by_token():
    folder = demo_folder("target")
    tokenizer, config = read(folder / "tokenizer.json"), read(folder / "config.json")
    fields = tokenizer_fields(tokenizer, read(folder / "tokenizer_config.json"), config)
    tokens = fields["tokenizer.ggml.tokens"][1]
    kinds = fields["tokenizer.ggml.token_type"][1]
    assert {token: index for index, token in enumerate(tokens)} == tokenizer["model"]["vocab"]
    assert [index for index, kind in enumerate(kinds) if kind == 3] == [0, 1, 2, 3]
    first = fields["tokenizer.ggml.merges"][1][2]
    assert first == " ".join(tokenizer["model"]["merges"][2])
    assert fields["tokenizer.ggml.eos_token_id"] == ("uint32", 0)
    assert fields["tokenizer.ggml.add_bos_token"] == ("bool", True)
    assert splitter_name(tokenizer) == "default"


def test_padded_rows_of_the_embedding_get_tokens_of_their_own():
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
    }
    fields = tokenizer_fields(tokenizer, {}, {"vocab_size": 4})
    assert fields["tokenizer.ggml.tokens"][1] == ["a", "b", "[PAD2]", "[PAD3]"]
    assert fields["tokenizer.ggml.pre"] == ("string", "gpt-2")
    assert len(set(ids_only_fields(4)["tokenizer.ggml.tokens"][1])) == 4


def test_other_tokenizers_are_refused_with_the_way_out():
    tokenizer = {"model": {"type": "Unigram", "vocab": []}}
    with pytest.raises(ValueError, match=r"Unigram.*--ids-only"):
        tokenizer_fields(tokenizer, {}, {"vocab_size": 4})
