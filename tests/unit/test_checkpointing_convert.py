"""Conversion: bitwise round trips, refusals, and what interrupted runs leave behind."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import tokenizers

from ssd_jax.checkpointing import (
    convert,
    converter,
    describe,
    load_checkpoint,
    partial_folder,
)
from ssd_jax.checkpointing.leaves import leaves_of
from ssd_jax.checkpointing.manifest import read_manifest, record_file
from ssd_jax.checkpointing.verify import verify_checkpoint
from ssd_jax.errors import CheckpointError
from ssd_jax.text import load_tokenizer

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir())
ROOT = Path(__file__).parents[2]


def assert_same_checkpoint(left, right):
    assert left.config == right.config
    left_leaves, right_leaves = leaves_of(left.params), leaves_of(right.params)
    assert left_leaves.keys() == right_leaves.keys()
    for name, leaf in left_leaves.items():
        assert leaf.dtype == right_leaves[name].dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(right_leaves[name]).tobytes(), name


def partial_folders(folder):
    return [path.name for path in folder.glob(".*.partial-*")]


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


@pytest.mark.parametrize("case", CASES)
def test_conversion_keeps_every_bit(case, tmp_path):
    manifest = convert(FIXTURES / case, tmp_path / "new" / case)
    assert_same_checkpoint(
        load_checkpoint(tmp_path / "new" / case), load_checkpoint(FIXTURES / case)
    )
    assert read_manifest(tmp_path / "new" / case) == manifest
    assert partial_folders(tmp_path / "new") == []


def test_manifest_says_where_the_weights_came_from(tmp_path):
    source = FIXTURES / "qwen2_5_sharded"
    manifest = convert(source, tmp_path / "out")
    expected = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in source.glob("model-*.safetensors")
    }
    assert {file.name: (file.size, file.sha256) for file in manifest.source_files} == expected
    assert manifest.source_config == json.loads((source / "config.json").read_text())
    assert manifest.num_params == load_checkpoint(source).config.num_params
    text = describe(tmp_path / "out")
    assert all(sha256 in text for _, sha256 in expected.values())
    assert f"{manifest.num_params:,}" in text


def test_small_parts_hold_the_same_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr("ssd_jax.checkpointing.orbax_io.PART_BYTES", 20_000)
    manifest = convert(FIXTURES / "llama31", tmp_path / "out")
    sizes = {}
    for leaf in manifest.leaves:
        sizes.setdefault(leaf.part, []).append(4 * int(np.prod(leaf.shape)))
    assert len(sizes) > 2
    assert all(sum(part) <= 20_000 or len(part) == 1 for part in sizes.values())
    assert_same_checkpoint(load_checkpoint(tmp_path / "out"), load_checkpoint(FIXTURES / "llama31"))


def test_dtype_of_conversion_and_of_loading(tmp_path):
    convert(FIXTURES / "llama", tmp_path / "out", "bfloat16")
    direct = load_checkpoint(FIXTURES / "llama", "bfloat16")
    assert_same_checkpoint(load_checkpoint(tmp_path / "out"), direct)
    widened = load_checkpoint(tmp_path / "out", "float32")
    assert widened.dtype == np.float32
    assert np.array_equal(widened.params.embedding, direct.params.embedding.astype(jnp.float32))
    with pytest.raises(CheckpointError, match="float16"):
        convert(FIXTURES / "llama", tmp_path / "half", "float16")


def test_tokenizer_files_travel_verbatim(tmp_path):
    source = shutil.copytree(FIXTURES / "llama31", tmp_path / "source")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 2}, unk_token="a"))
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    (source / "notes.txt").write_text("not for the converter")
    manifest = convert(source, tmp_path / "out")
    names = [file.name for file in manifest.tokenizer_files]
    assert set(names) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    folder = load_checkpoint(tmp_path / "out").tokenizer_folder
    assert load_tokenizer(folder).eos_ids == load_tokenizer(source).eos_ids == (2, 3)
    for line in describe(folder).splitlines():
        if line.startswith("tokenizer"):
            assert "WordLevel" in line
            assert "2, 3" in line
    assert "chat template  yes" in describe(folder)


def test_progress_counts_every_byte_of_every_stage(tmp_path):
    reports = []
    convert(
        FIXTURES / "llama",
        tmp_path / "out",
        progress=lambda stage, done, total: reports.append((stage, done, total)),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in reports))
    assert stages == ["hashing", "converting", "verifying"]
    for stage in stages:
        counts = [(done, total) for name, done, total in reports if name == stage]
        assert counts == sorted(counts)
        assert counts[0][0] == 0
        assert counts[-1][0] == counts[-1][1]


def test_existing_destination_is_only_replaced_on_request(tmp_path):
    convert(FIXTURES / "llama", tmp_path / "out")
    with pytest.raises(CheckpointError, match="out, which exists"):
        convert(FIXTURES / "qwen2", tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").config.family == "llama"
    convert(FIXTURES / "qwen2", tmp_path / "out", overwrite=True)
    assert_same_checkpoint(load_checkpoint(tmp_path / "out"), load_checkpoint(FIXTURES / "qwen2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "empty").mkdir()
    convert(FIXTURES / "qwen2", tmp_path / "empty")


def test_overwrite_never_removes_what_is_no_converted_checkpoint(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        convert(FIXTURES / "llama", tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        convert(FIXTURES / "llama", tmp_path / "thesis.txt", overwrite=True)
    source = shutil.copytree(FIXTURES / "llama", tmp_path / "source")
    for inside in (source, source / "out"):
        with pytest.raises(CheckpointError, match="outside the source folder"):
            convert(source, inside, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_bad_source_leaves_nothing_behind(tmp_path):
    source = shutil.copytree(FIXTURES / "qwen2_5_sharded", tmp_path / "source")
    path = source / "model-00002-of-00002.safetensors"
    contents = path.read_bytes()
    path.write_bytes(contents[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(CheckpointError, match=r"1 not finite in float32: model\.norm"):
        convert(source, tmp_path / "out")
    path.write_bytes(contents[:-1])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ssd_jax.checkpointing.converter.write_synced", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*the disk not full"):
        convert(FIXTURES / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    needed = 4 * load_checkpoint(FIXTURES / "llama").config.num_params
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(CheckpointError, match=f"{needed:,} bytes free .* got {needed - 1:,}"):
        convert(FIXTURES / "llama", tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed))
    convert(FIXTURES / "llama", tmp_path / "new" / "out")


def test_full_disk_inside_orbax_is_a_sentence_too(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device\nand so on")

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointer.save", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device\).*disk not full\.$"):
        convert(FIXTURES / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failed_replacement_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    convert(FIXTURES / "llama", tmp_path / "out")

    def fail(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(partial_folder, "exchange_names", fail)
    with pytest.raises(CheckpointError, match="broken disk"):
        convert(FIXTURES / "qwen2", tmp_path / "out", overwrite=True)
    assert load_checkpoint(tmp_path / "out").config.family == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_second_step_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    convert(FIXTURES / "llama", tmp_path / "out")
    rename = Path.rename

    def fail_for_new(self, target):
        if target.name == "out" and (self / "manifest.json").read_text().count("qwen2"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    monkeypatch.setattr(partial_folder, "exchange_names", lambda *_: False)
    with pytest.raises(CheckpointError, match="broken disk"):
        convert(FIXTURES / "qwen2", tmp_path / "out", overwrite=True)
    assert load_checkpoint(tmp_path / "out").config.family == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["[1]", "a*b?", "ck.partial-0123456789ab", "-x", "ü", "\udcff"])
def test_any_name_works_and_is_no_pattern(tmp_path, name):
    for other in ("1", "ck", "axb1"):  # what a pattern made of the name would match
        (tmp_path / f".{other}.partial-0123456789ab").mkdir()
    kept = sorted(path.name for path in tmp_path.iterdir())
    convert(FIXTURES / "qwen2", tmp_path / name, overwrite=True)
    (tmp_path / f".{name}.partial-ba9876543210").mkdir()
    convert(FIXTURES / "llama", tmp_path / name, overwrite=True)
    assert_same_checkpoint(load_checkpoint(tmp_path / name), load_checkpoint(FIXTURES / "llama"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, name])


def test_a_link_as_destination_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for source in ("llama", "qwen2"):
        convert(FIXTURES / source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert load_checkpoint(tmp_path / "disk" / "real").config.family == "qwen2"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop"):
        convert(FIXTURES / "llama", tmp_path / "loop")


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    def interfere(stage, done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("precious")

    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        convert(FIXTURES / "llama", tmp_path / "out", overwrite=True, progress=interfere)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def broken_tokenizers():
    words = {"a": 0, "b": 1, "</s>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    whole = json.loads(backend.to_str())
    far = dict(whole, model=dict(whole["model"], vocab=words | {"far": 512}))
    padded = dict(whole, model=dict(whole["model"], vocab=words | {"<pad>": 512}))
    named = {"tokenizer_config.json": json.dumps({"pad_token": "<pad>"})}
    template = {"chat_template.jinja": "{% for m in messages %}{{ m.content"}
    unknown = {"chat_template.jinja": "{{ messages | nonsense }}"}
    moody = {"chat_template.jinja": "{{ raise_exception('not that one') }}"}
    return {
        "unreadable": ({"tokenizer.json": "{"}, r"tokenizer\.json"),
        "far token": ({"tokenizer.json": json.dumps(far)}, r"vocab_size .* got 512 for 'far'"),
        "far unnamed": ({"tokenizer.json": json.dumps(padded)}, r"got 512 for '<pad>'"),
        "far padding": ({"tokenizer.json": json.dumps(padded)} | named, None),
        "template": ({"tokenizer.json": json.dumps(whole)} | template, "syntax error in line 1"),
        "filter": ({"tokenizer.json": json.dumps(whole)} | unknown, "syntax error.*nonsense"),
        "moody template": ({"tokenizer.json": json.dumps(whole)} | moody, None),
    }


BROKEN = broken_tokenizers()


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_found_before_weights_are_written(tmp_path, monkeypatch, case):
    files, message = BROKEN[case]
    source = shutil.copytree(FIXTURES / "llama", tmp_path / "source")
    vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
    for name, text in files.items():
        (source / name).write_text(text.replace("512", str(vocab_size)))
    if message is None:
        convert(source, tmp_path / "out")
        return
    monkeypatch.setattr(converter, "write_parts", lambda *_: pytest.fail("weights were written"))
    with pytest.raises(CheckpointError, match=message.replace("512", str(vocab_size))):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# A limit on the size of files makes writing fail as a full disk does, with another number.
FULL_PROGRAM = """
import os, resource, sys
from pathlib import Path
import orbax.checkpoint
from ssd_jax.checkpointing import convert
from ssd_jax.errors import CheckpointError

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
for size in (0, 300, 5_000, 20_000):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            convert(source, folder / "out")
        except CheckpointError as error:
            sys.stdout.write(f"{error}\\n")
        sys.exit()
    os.waitpid(child, 0)
"""


def test_a_disk_that_refuses_more_is_one_sentence_without_tracebacks(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FULL_PROGRAM, str(FIXTURES / "llama31")]
    done = subprocess.run(
        [*command, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("Expected to write")
        assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


def test_unwritable_destination_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/out, but that failed"):
        convert(FIXTURES / "llama", tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 250, "a\0b"])
def test_names_that_no_folder_can_have_are_a_sentence(tmp_path, name):
    with pytest.raises(CheckpointError) as caught:
        convert(FIXTURES / "llama", tmp_path / name)
    assert len(str(caught.value)) < 700
    assert list(tmp_path.iterdir()) == []


def test_second_writer_of_the_same_destination_is_refused(tmp_path):
    stale = tmp_path / ".out.partial-0123456789ab"
    stale.mkdir()
    descriptor = os.open(stale, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process is at it"):
        convert(FIXTURES / "llama", tmp_path / "out")
    os.close(descriptor)
    convert(FIXTURES / "llama", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_values_that_come_back_different_are_noticed(tmp_path, monkeypatch):
    save = orbax.checkpoint.PyTreeCheckpointer.save

    def corrupt(self, path, leaves):
        save(self, path, {name: leaf + (name == "final_norm") for name, leaf in leaves.items()})

    monkeypatch.setattr(orbax.checkpoint.PyTreeCheckpointer, "save", corrupt)
    with pytest.raises(CheckpointError, match=r"read back .* but final_norm differs"):
        convert(FIXTURES / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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


# Forks a child for every point before jax has started any thread; each child dies by SIGKILL there.
KILL_PROGRAM = """
import os, signal, sys
from pathlib import Path
import orbax.checkpoint
import ssd_jax.checkpointing as checkpointing
from ssd_jax.checkpointing import converter, orbax_io, partial_folder

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
orbax_io.PART_BYTES = 50_000
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def at(stage, count):
    calls = []
    def progress(name, done, total):
        calls.append(name)
        if calls.count(stage) == count:
            die()
    return lambda: progress

def patched(module, name):
    def patch():
        setattr(module, name, die)
    return patch

points = {
    "hashing": at("hashing", 1),
    "first_leaf": at("converting", 2),
    "later_leaf": at("converting", 9),
    "verifying": at("verifying", 3),
    "manifest": patched(converter, "write_synced"),
    "swap": patched(partial_folder, "_put_in_place"),
    "rename_in_orbax": patched(os, "rename"),
}
for name, arm in points.items():
    child = os.fork()
    if child == 0:
        checkpointing.convert(source, folder / name, progress=arm())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(name, os.WIFSIGNALED(status) and os.WTERMSIG(status))
"""


def test_killed_runs_leave_nothing_that_loads_and_a_rerun_completes(tmp_path):
    source = FIXTURES / "llama31"
    command = [sys.executable, "-W", "ignore", "-c", KILL_PROGRAM, str(source), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    outcomes = dict(line.split() for line in done.stdout.splitlines())
    assert len(outcomes) == 7
    assert set(outcomes.values()) == {"9"}, done.stderr
    leftovers = partial_folders(tmp_path)
    assert len(leftovers) == 7
    for name in outcomes:
        with pytest.raises(CheckpointError, match="found none"):
            load_checkpoint(tmp_path / name)
    for name in leftovers:
        if ".swap." not in name:  # there it was complete and only its name is missing
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path / name)
    expected = load_checkpoint(source)
    for name in ("first_leaf", "swap"):
        convert(source, tmp_path / name)
        assert_same_checkpoint(load_checkpoint(tmp_path / name), expected)
        assert not any(f".{name}." in other for other in partial_folders(tmp_path))


def test_script_converts_and_reports_errors_on_stderr(tmp_path, monkeypatch, capsys):
    def run_script():
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / "checkpoints" / "convert.py"), run_name="__main__")
        return exit_info.value.code, capsys.readouterr()

    arguments = [str(FIXTURES / "qwen2"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
    code, output = run_script()
    assert code == 0
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.dtype == jnp.bfloat16
    num_params = sum(leaf.size for leaf in leaves_of(loaded.params).values())
    assert output.out.endswith(f"out: {num_params:,} parameters, bfloat16\n")
    assert "converting" in output.err
    code, output = run_script()
    assert code == 2
    assert output.out == ""
    assert "pass --overwrite" in output.err
