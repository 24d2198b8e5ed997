"""Damaged converted folders: each loads as the original does, or is told in words."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzz_cases import SLOW_COUNT, assert_sentence, numbered

from ssd_jax.checkpointing import convert, load_checkpoint, orbax_io
from ssd_jax.checkpointing.leaves import leaves_of
from ssd_jax.errors import SsdJaxError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CASES = ("llama", "llama31", "qwen3_bf16", "qwen2")
MANIFEST = "manifest.json"
# Numbers that a field may hold are left out: with a hash that fits, they are another model.
JUNK = (None, "", "x", "\ud800", "x" * 5000, -1, 10**60, float("nan"), float("inf"), [], {}, [[1]])
NAMES = ("/etc/passwd", "../x", "00000/../../x", "00000//x", ".", "x" * 5000, "00000", "00000/\0")
DEEP = (b"[" * 10**5, b'{"a":' * 10**5, b'{"a":' * 100 + b"1" + b"}" * 100, b"9" * 5000)
FREE = ("source_config", "tool", "created", "source_files", "tokenizer_files")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Converted folders of several parts each, and what they hold."""
    root = tmp_path_factory.mktemp("converted")
    before, orbax_io.PART_BYTES = orbax_io.PART_BYTES, 60_000
    try:
        for case in CASES:
            convert(FIXTURES / case, root / case)
    finally:
        orbax_io.PART_BYTES = before
    return {root / case: held_in(root / case) for case in CASES}


def held_in(folder):
    loaded = load_checkpoint(folder)
    leaves = leaves_of(loaded.params)
    return loaded.config, {
        n: (leaf.dtype, np.asarray(leaf).tobytes()) for n, leaf in leaves.items()
    }


def with_hash(raw):
    """The manifest's text with a hash that fits."""
    raw = {name: value for name, value in raw.items() if name != "sha256"}
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(raw | {"sha256": hashlib.sha256(canonical).hexdigest()}).encode()


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
        if isinstance(entry, dict | list):
            yield from places(entry, (*path, key))
        else:
            yield (*path, key)


def edit(random, raw, *, is_hidden):
    """Another value somewhere in a manifest; `is_hidden` if its hash will be made to fit."""
    *keys, last = random.choice(list(places(raw)))
    holder = raw
    for key in keys:
        holder = holder[key]
    if random.random() < 0.2 and not (keys == ["config"] and last == "rope_scaling"):
        del holder[last]
        return
    value = random.choice(JUNK)
    if last in ("name", "part", "params_files") and random.random() < 0.5:
        value = random.choice((*NAMES, []))
    if is_hidden and (last == "rope_scaling" and value is None):
        return
    holder[last] = value


def shuffle(random, raw, others):
    """Entries of a manifest in other places, or another manifest's."""
    other = json.loads((random.choice(others) / MANIFEST).read_bytes())
    files, leaves = raw["params_files"], raw["leaves"]
    if not files:  # taken away the first time
        return
    first, second = random.sample(range(len(leaves)), 2)
    match random.randrange(7):
        case 0:
            raw["config"] = other["config"]
        case 1:
            raw["leaves"] = other["leaves"]
        case 2:
            raw["params_files"] = random.choice((other["params_files"], [], files + files))
        case 3:
            field = random.choice(("part", "name", "shape"))
            a, b = leaves[first], leaves[second]
            a[field], b[field] = b[field], a[field]
        case 4:
            leaves[first] = leaves[second]
        case 5:
            random.choice(files)["size"] += random.choice((-1, 1))
        case _:
            raw["dtype"] = random.choice(("bfloat16", "float32", "float16"))


def change_manifest(random, folder, others):
    """A manifest cut, flipped, edited or another's, its hash mostly made to fit."""
    path = folder / MANIFEST
    contents = path.read_bytes()
    match random.randrange(8):
        case 0:
            path.write_bytes(contents[: random.randrange(len(contents))])
        case 1:
            changed = bytearray(contents)
            for _ in range(random.randint(1, 3)):
                changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
            path.write_bytes(changed)
        case 2:
            junk = json.dumps(random.choice(JUNK)).encode()
            path.write_bytes(random.choice((*DEEP, junk, b"\xff", b"")))
        case 3:
            shutil.copy(random.choice(others) / MANIFEST, path)
        case kind:
            raw, is_hidden = json.loads(contents), random.random() < 0.8
            for _ in range(random.randint(1, 2)):
                if kind < 7:
                    edit(random, raw, is_hidden=is_hidden)
                    break  # what was a list may be none any more
                shuffle(random, raw, others)
            path.write_bytes(with_hash(raw) if is_hidden else json.dumps(raw).encode())


def change_files(random, folder, others):
    """Parts or their files gone, cut, swapped, links, folders or another checkpoint's."""
    params = folder / "params"
    parts = sorted(params.iterdir())
    files = sorted(path for path in params.rglob("*") if path.is_file())
    path = random.choice(files)
    match random.choice((0, 1, 2, 3, 4, 6, 7, 8, *([5] if len(parts) > 1 else []))):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(path.read_bytes()[: random.randrange(max(1, path.stat().st_size))])
        case 2:
            path.write_bytes(path.read_bytes() + b"x")
        case 3:
            path.unlink()
            random.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)))()
        case 4:
            shutil.rmtree(random.choice((*parts, params)))
        case 5:
            one, other = random.sample(parts, 2)
            one.rename(params / "aside")
            other.rename(one)
            (params / "aside").rename(other)
        case 6:
            one, other = random.sample(files, 2)
            one.rename(params / "aside")
            other.rename(one)
            (params / "aside").rename(other)
        case 7:
            shutil.rmtree(params)
            shutil.copytree(random.choice(others) / "params", params)
        case _:
            part = random.choice(parts)
            shutil.rmtree(part)
            shutil.copytree(random.choice(list((random.choice(others) / "params").iterdir())), part)


def check_inputs(numbers, tmp_path, folders):
    """Refuse each input in a sentence, or load it as the original; the share that was refused."""
    refused = tried = 0
    for number in numbers:
        tried += 1
        generator = random.Random(number)
        source = generator.choice(list(folders))
        others = [other for other in folders if other != source]
        folder = shutil.copytree(source, tmp_path / source.name)
        change = generator.choice((change_manifest, change_manifest, change_files))
        change(generator, folder, others)
        try:
            assert held_in(folder) == folders[source], f"input {number}: another model"
        except SsdJaxError as error:
            refused += 1
            assert_sentence(number, error, folder)
        except Exception as error:
            raise AssertionError(f"input {number}: {error!r:.500}") from error
        shutil.rmtree(folder)
    return refused / tried


def test_damaged_folders_are_refused_or_change_nothing(tmp_path, folders):
    assert 0.6 < check_inputs(numbered(300), tmp_path, folders) < 1


@pytest.mark.slow
def test_ten_thousand_damaged_folders(tmp_path, folders):
    check_inputs(numbered(SLOW_COUNT), tmp_path, folders)
