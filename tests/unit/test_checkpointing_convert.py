"""Conversion: bitwise round trips, refusals, and what interrupted runs leave behind."""

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
from ssd_jax.checkpointing.manifest import read_manifest
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


def test_values_that_come_back_different_are_noticed(tmp_path, monkeypatch):
    save = orbax.checkpoint.PyTreeCheckpointer.save

    def corrupt(self, path, leaves):
        save(self, path, {name: leaf + (name == "final_norm") for name, leaf in leaves.items()})

    monkeypatch.setattr(orbax.checkpoint.PyTreeCheckpointer, "save", corrupt)
    with pytest.raises(CheckpointError, match=r"read back .* but final_norm differs"):
        convert(FIXTURES / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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
