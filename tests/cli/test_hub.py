"""Models by name, on a hub that answers on loopback: what is fetched and kept, and how it fails."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hub_server import COMMIT, serving

import ssd_jax
from ssd_jax.errors import CheckpointError, ConfigError
from ssd_jax.hub import model_folder

NAME = "some-one/tiny"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "vocab_size": 8,
    "max_position_embeddings": 64,
}
MODEL = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "README.md": b"words",
    "pytorch_model.bin": b"the same weights",
    "onnx/model.safetensors": b"and again",
}
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
SHARDED = {
    "config.json": MODEL["config.json"],
    "model.safetensors.index.json": json.dumps({"weight_map": SHARDS}).encode(),
    **{file: file.encode() for file in SHARDS.values()},
    "model-old.safetensors": b"not in the index",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one small repository, and an empty cache of its files."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving({NAME: dict(MODEL)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        huggingface_hub.close_session()


def refused(name, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        model_folder(name)
    message = str(caught.value)
    assert len(message) < 500
    assert "\n" not in message
    return message


def test_a_name_on_the_hub_becomes_a_folder_with_the_files_that_are_read(hub):
    folder = model_folder(NAME)
    files = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert sorted(hub.fetched()) == sorted(files)
    asked = len(hub.fetched())
    assert model_folder(NAME) == folder
    assert len(hub.fetched()) == asked


def test_shards_are_those_of_the_index(hub):
    hub.repos["some-one/large"] = SHARDED
    folder = model_folder("some-one/large")
    assert {path.name for path in folder.glob("*.safetensors")} == set(SHARDS.values())


def test_a_revision_is_asked_for(hub):
    assert model_folder(f"{NAME}@v1") == model_folder(f"{NAME}@{COMMIT}") == model_folder(NAME)
    assert any("/revision/v1" in path for path in hub.asked)
    assert "has no revision 'v2'" in refused(f"{NAME}@v2")


def test_a_folder_of_that_name_wins_without_network(hub, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert model_folder(NAME).resolve() == (tmp_path / NAME).resolve()
    assert hub.asked == []


def test_a_folder_needs_neither_the_hub_nor_its_library(tmp_path):
    code = "import sys; from ssd_jax.hub import model_folder; print(model_folder('~/here')); "
    code += "sys.exit('huggingface_hub' in sys.modules)"
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == str(tmp_path / "here")


@pytest.mark.parametrize(
    "name", ["nowhere", "./some-one/tiny", "../tiny", "/some-one/tiny", "a/b/c", "", "a" * 5000,
             "some-one/", "some-one/ti ny", "~/tiny", "some-one/tiny@", "\0", "\udc80/x"]
)  # fmt: skip
def test_what_has_not_the_form_of_a_name_is_refused_without_network(hub, name):
    assert "names on the hub look different" in refused(name)
    assert hub.asked == []


def test_a_form_that_the_hub_itself_does_not_take(hub):
    assert "neither" in refused("some-one/a..b")


@pytest.mark.parametrize(
    ("file", "words"), [("m.gguf", "the GGUF file"), ("model.safetensors", "folder that it is in")]
)
def test_a_file_is_told_as_one(hub, tmp_path, file, words):
    (tmp_path / file).touch()
    assert words in refused(tmp_path / file)


def test_an_unknown_model(hub):
    message = refused("some-one/tinny")
    assert "no folder some-one/tinny here and no public model" in message
    assert hub.url in message


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "no public model"),
        (403, "GatedRepo", "is gated"),
        (401, "GatedRepo", "is gated"),
        (403, None, "refuses some-one/tiny to you (HTTP 403)"),
        (401, "", "HF_TOKEN"),
        (410, None, "answered HTTP 410"),
    ],
)
def test_a_refusal_of_the_hub(hub, status, code, words):
    hub.refusals[NAME] = (status, code)
    assert words in refused(NAME)


def test_a_gated_model_shows_its_names_and_not_its_files(hub):
    hub.files_are_gated = True
    message = refused(NAME)
    assert f"ask for it at {hub.url}/{NAME}" in message
    assert "HF_TOKEN" in message


def test_a_private_model_needs_the_token(hub, monkeypatch):
    hub.private_token = "hf_secret"
    assert "set HF_TOKEN if it is private" in refused(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (model_folder(NAME) / "model.safetensors").read_bytes() == b"weights"


def test_a_truncated_file_is_said_and_fetched_by_the_next_run(hub):
    hub.cut_at["model.safetensors"] = 3
    hub.repos[NAME]["model.safetensors"] = b"weights" * 100
    # the server says 700 bytes and closes after three, as often as it is asked
    import huggingface_hub.file_download as downloads

    downloads.time.sleep, sleep = (lambda seconds: None), downloads.time.sleep
    try:
        assert "broke off" in refused(NAME)
    finally:
        downloads.time.sleep = sleep
    hub.cut_at.clear()
    hub.asked.clear()
    assert len((model_folder(NAME) / "model.safetensors").read_bytes()) == 700
    assert hub.fetched() == ["model.safetensors"]


def test_offline_takes_what_is_in_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    folder = model_folder(NAME)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(NAME) == folder
    assert hub.asked == []
    message = refused("some-one/other")
    assert "HF_HUB_OFFLINE forbids" in message
    (folder / "model.safetensors").unlink()
    assert "does not hold all" in refused(NAME)


def test_without_a_network_the_cache_serves_and_else_a_sentence_says_so(hub, monkeypatch):
    from huggingface_hub import constants

    folder = model_folder(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert model_folder(NAME) == folder
    message = refused("some-one/other")
    assert "cannot be reached" in message
    assert "http://127.0.0.1:9" in message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "pytorch_model.bin"], "weights in .bin files instead; save it again"),
        (["tiny.Q4_K_M.gguf", "README.md"], "weights in .gguf files instead; name the repository"),
        (["config.json", "README.md"], "has no weights instead"),
        (["config.json", "onnx/model.safetensors"], ".safetensors"),
    ],
)
def test_other_formats_are_told_before_anything_is_fetched(hub, files, words):
    hub.repos[NAME] = {name: MODEL.get(name, b"x") for name in files}
    assert words in refused(NAME)
    assert not {"pytorch_model.bin", "tiny.Q4_K_M.gguf"} & set(hub.fetched())


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(hub):
    hub.repos[NAME]["config.json"] = b'{"model_type": "mamba"}'
    assert "The model some-one/tiny on the hub cannot be run" in refused(NAME, ConfigError)
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize(
    ("fault", "words"), [(28, "is full"), (13, "cannot be written"), (30, "cannot be written")]
)
def test_a_disk_that_refuses(hub, monkeypatch, fault, words):
    import huggingface_hub

    def fail(*args, **options):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert words in refused(NAME)


def test_every_command_takes_a_name(hub, run, tiny_checkpoint, tmp_path):
    hub.repos[NAME] = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    models = ("--model", f"{NAME}@main", "--draft-model", NAME)
    outcome = run("generate", "the", "--method", "draft", *models, "--max-tokens", "2", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(outcome.out) > 1
    assert "llama" in run("inspect", NAME).out
    assert run("convert", NAME, tmp_path / "converted").code == 0
    assert ssd_jax.load_model(NAME).tokenizer is not None
    assert run("generate", "the", "--model", "some-one/none").code == 2


FETCH = """
import signal, sys
from ssd_jax.hub import model_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
try:
    print(model_folder(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_variables_of_the_environment_and_an_interrupt(hub, tmp_path):
    hub.stalled["model.safetensors"] = threading.Event()
    cache = tmp_path / "own"
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, NAME], stderr=subprocess.PIPE, env=environment
    )
    give_up = time.monotonic() + 60
    while "model.safetensors" not in hub.fetched() and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    hub.stalled.pop("model.safetensors").set()
    hub.asked.clear()
    done = subprocess.run([sys.executable, "-c", FETCH, NAME], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(cache).encode() in done.stdout
    assert hub.fetched() == ["model.safetensors"]
