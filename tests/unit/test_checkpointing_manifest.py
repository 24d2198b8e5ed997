"""What a converted folder says of itself: manifests and files that do not fit, and `--verify`."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint
import pytest

from ssd_jax.checkpointing import convert, describe, load_checkpoint
from ssd_jax.checkpointing.manifest import read_manifest, record_file
from ssd_jax.checkpointing.verify import verify_checkpoint
from ssd_jax.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("converted") / "llama31"
    convert(FIXTURES / "llama31", folder)
    return folder


@pytest.fixture
def damaged(converted, tmp_path):
    """A copy of the converted checkpoint for a test to damage."""
    return shutil.copytree(converted, tmp_path / "damaged")


def rewrite(folder, change, *, with_hash=True):
    """Change the manifest of a folder; by default its hash is made to fit."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    stated = raw.pop("sha256")
    raw = change(raw) or raw
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    raw["sha256"] = hashlib.sha256(canonical).hexdigest() if with_hash else stated
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("version", [1, 99, None, True, 2.0, "2", [2]])
def test_unknown_format_version_is_refused(damaged, version):
    rewrite(damaged, lambda raw: raw.update(format_version=version))
    with pytest.raises(CheckpointError, match=r"Expected format version 2 .*convert .* again"):
        load_checkpoint(damaged)


def test_an_unchanged_manifest_loads_when_it_is_written_anew(damaged):
    rewrite(damaged, lambda raw: None)
    load_checkpoint(damaged)


def setting(*path):
    """A change that puts the last of its arguments where the others lead."""
    *keys, last, value = path

    def change(raw):
        for key in keys:
            raw = raw[key]
        raw[last] = value

    return change


def dropping(*path):
    *keys, last = path

    def change(raw):
        for key in keys:
            raw = raw[key]
        del raw[last]

    return change


SCALARS = (None, True, 1.5, "x", [], {}, [[1]], -1, 10**60, float("nan"), float("inf"))
SENSELESS = {
    "no config": dropping("config"),
    "no theta": dropping("config", "rope_theta"),
    "surplus": setting("surplus", 3),
    "surplus in config": setting("config", "surplus", 3),
    "surplus in leaf": setting("leaves", 0, "surplus", 3),
    "no files": setting("params_files", []),
    "files of one part only": lambda raw: raw.update(
        params_files=[f for f in raw["params_files"] if f["name"].startswith("00000")][:-1]
        and [dict(raw["params_files"][0], name="00001/x")]
    ),
    "a file twice": lambda raw: raw["params_files"].append(raw["params_files"][0]),
    "a leaf twice": lambda raw: raw["leaves"].append(raw["leaves"][0]),
    "a leaf fewer": dropping("leaves", 0),
    "other layers": setting("config", "num_layers", 3),
    "a million layers": setting("config", "num_layers", 10**6),
    "swapped leaves": lambda raw: raw["leaves"][0].update(name=raw["leaves"][1]["name"]),
    "shape of text": setting("leaves", 0, "shape", "32"),
    "shape of bools": setting("leaves", 0, "shape", [True, 32]),
    "dtype": setting("dtype", "float16"),
    "count": setting("num_params", 7),
    "hash": setting("params_files", 0, "sha256", "0" * 63),
    "tokenizer elsewhere": setting("tokenizer_files", 0, "name", "a/tokenizer.json"),
    "linear scaling without factor": setting("config", "rope_scaling", {"kind": "linear"}),
    "scaling of text": setting("config", "rope_scaling", "linear"),
}
SENSELESS |= {
    f"{name} {value!r:.20}": setting("config", name, value)
    for name in ("rope_theta", "rms_norm_eps", "family", "qk_norm", "num_heads", "tied_embeddings")
    for value in SCALARS
    if (name, value) not in (("qk_norm", True), ("tied_embeddings", True), ("rope_theta", 1.5))
}
SENSELESS |= {
    f"{name} {value!r:.20}": setting(name, value)
    for name in ("config", "leaves", "params_files", "source_files", "tokenizer_files", "tool")
    for value in SCALARS
    if (name, value) not in (("tool", "x"), ("source_files", []), ("tokenizer_files", []))
}
NAMES = ("/etc/passwd", "../x", "00000/../../x", "00000//x", "00000/./x", "", "x" * 5000, "00000")
SENSELESS |= {
    f"{what} {value!r:.20}": setting(*place, value)
    for what, place in {
        "file": ("params_files", 1, "name"),
        "part": ("leaves", 0, "part"),
    }.items()
    for value in (*SCALARS, *NAMES, "00000/" + "y" * 300, "00000/\0", "\udcff", "00000/a\\b")
    if (what, value) != ("part", "00000")
}


@pytest.mark.parametrize("case", SENSELESS)
def test_senseless_manifest_is_refused_even_if_its_hash_fits(converted, tmp_path, case):
    shutil.copy(converted / "manifest.json", tmp_path)
    rewrite(tmp_path, SENSELESS[case])
    for read in (load_checkpoint, describe):
        with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        setting("config", "rope_theta", 10001.0),
        setting("config", "rms_norm_eps", 1e-3),
        setting("leaves", 0, "part", "00001"),
        setting("params_files", 0, "size", 7),
        setting("source_config", {}),
        setting("created", "now"),
    ],
)
def test_an_edited_manifest_is_refused(damaged, change):
    rewrite(damaged, change, with_hash=False)
    with pytest.raises(CheckpointError, match="hash that it states"):
        load_checkpoint(damaged)


def test_a_manifest_of_another_checkpoint_is_refused(damaged, tmp_path):
    other = shutil.copytree(FIXTURES / "llama31", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    convert(other, tmp_path / "out")
    shutil.copy(tmp_path / "out" / "manifest.json", damaged)
    with pytest.raises(CheckpointError, match=r"params.*damaged"):
        load_checkpoint(damaged)


@pytest.mark.parametrize("place", ["params", ""])
def test_verify_names_a_flipped_byte(damaged, place):
    assert verify_checkpoint(damaged)[0] > 4
    files = [path for path in (damaged / place).iterdir() if path.name != "manifest.json"]
    files = [path for path in files if path.is_file()] or list((damaged / place).rglob("*"))
    for path in (path for path in files if path.is_file() and path.stat().st_size):
        contents = path.read_bytes()
        path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{path.name} has other contents; convert"):
            verify_checkpoint(damaged)
        path.write_bytes(contents)
    verify_checkpoint(damaged)


def test_verify_names_what_is_absent_or_shorter_and_says_how_far_it_is(damaged):
    first, second, *_ = [path for path in (damaged / "params").rglob("*") if path.is_file()]
    first.unlink()
    second.write_bytes(second.read_bytes() + b"x")
    reports = []
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(damaged, lambda *report: reports.append(report))
    assert f"{first.name} is absent" in str(caught.value)
    assert f"{second.name} has " in str(caught.value)
    total = sum(file.size for file in read_manifest(damaged).params_files)
    assert reports[0][1] == 0
    assert reports[-1][1] == reports[-1][2] >= total
    with pytest.raises(CheckpointError, match="only those record hashes"):
        verify_checkpoint(FIXTURES / "llama")


@pytest.mark.parametrize("damage", ["lengthen", "truncate", "remove"])
def test_every_shortened_or_absent_orbax_file_is_noticed(damage, converted, tmp_path):
    files = [path for path in (converted / "params").rglob("*") if path.is_file()]
    for path in files:
        folder = shutil.copytree(converted, tmp_path / "damaged")
        target = folder / path.relative_to(converted)
        contents = bytearray(target.read_bytes())
        if damage == "remove" or not contents:
            target.unlink()
        elif damage == "truncate":
            target.write_bytes(contents[: len(contents) // 2])
        else:
            target.write_bytes(contents + b"x")
        assert "problem" in describe(folder)
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(folder)
        shutil.rmtree(folder)


def test_orbax_folder_that_does_not_fit_the_manifest_is_refused(damaged):
    params = damaged / "params"
    for content, message in (({"surplus": np.ones(3)}, "embedding is not what"), (None, "damaged")):
        shutil.rmtree(params / "00000")
        (params / "00000").mkdir()
        (params / "00000" / "empty").touch()
        if content is not None:
            shutil.rmtree(params / "00000")
            with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(params / "00000", content)
        files = [path for path in params.rglob("*") if path.is_file()]
        records = [dataclasses.asdict(record_file(path, params)) for path in files]
        rewrite(damaged, setting("params_files", records))
        with pytest.raises(CheckpointError, match=f"params/00000.*{message}"):
            load_checkpoint(damaged)
