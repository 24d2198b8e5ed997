"""Malformed safetensors files and indexes: each loads as the original does, or is told in words."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzz_cases import SLOW_COUNT, assert_sentence, numbered

from ssd_jax.checkpointing import convert, load_checkpoint
from ssd_jax.checkpointing.hf_loader import iter_hf_leaves, open_hf_checkpoint
from ssd_jax.errors import SsdJaxError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CASES = ("llama", "llama_mha", "qwen3_bf16", "qwen2_5_sharded")
INDEX = "model.safetensors.index.json"
HUGE = (0, -1, 2**31, 2**53 + 1, 2**63, 2**64, 10**60)
JUNK = (
    *HUGE,
    None,
    True,
    1.5,
    float("nan"),
    "",
    "x",
    "x" * 5000,
    "\ud800",
    [],
    {},
    [[1]],
    {"a": 1},
)
DEEP = (b"[" * 10**5, b'{"a":' * 10**5, b'{"a":' * 100 + b"1" + b"}" * 100, b"9" * 5000)


def split(contents):
    """The header's table and the bytes behind it."""
    start = 8 + int.from_bytes(contents[:8], "little")
    return json.loads(contents[8:start]), contents[start:]


def joined(text, body):
    return len(text).to_bytes(8, "little") + text + body


def as_text(table):
    return json.dumps(table).encode()


def is_whole(entry):
    """Whether an entry of a header is as the library writes it: it may have been changed before."""
    return (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["shape"], list)
        and all(type(size) is int and 0 < size < 10**6 for size in entry["shape"])
        and isinstance(entry["data_offsets"], list)
        and [type(offset) for offset in entry["data_offsets"]] == [int, int]
        and 0 <= entry["data_offsets"][0] <= entry["data_offsets"][1] < 10**9
    )


def bytes_of_file(random, contents):
    """The file cut, lengthened, or with other bytes in its first part."""
    start = 8 + int.from_bytes(contents[:8], "little")
    match random.randrange(5):
        case 0:
            return contents[: random.randrange(len(contents))]
        case 1:
            return contents + random.randbytes(random.randint(1, 100))
        case 2:
            length = random.choice((0, 1, start - 9, start - 7, len(contents), *HUGE[2:6]))
            return min(length, 2**64 - 1).to_bytes(8, "little") + contents[8:]
        case 3:
            changed = bytearray(contents)
            for _ in range(random.randint(1, 3)):
                changed[random.randrange(start)] ^= 1 << random.randrange(8)
            return bytes(changed)
        case _:
            return b""


def entry_of_header(random, contents):
    """One entry of the header with another dtype, shape, offsets or name, gone, or twice."""
    table, body = split(contents)
    whole = {key: entry for key, entry in table.items() if is_whole(entry)}
    name, entry = random.choice(list(whole.items()))
    begin, end = entry["data_offsets"]
    match random.randrange(9):
        case 0:
            kinds = ("I32", "U8", "F64", "F8_E4M3", "BOOL", "f32", "F99", *JUNK)
            entry["dtype"] = random.choice(kinds)
        case 1:
            entry["shape"] = random.choice(
                [
                    [*entry["shape"], 1],
                    [int(np.prod(entry["shape"])), 1, 1],
                    [random.choice(JUNK)],
                    [2**32, 2**32],
                    random.choice(JUNK),
                ]
            )
        case 2:
            entry["data_offsets"] = random.choice(
                [
                    [end, begin],
                    [begin + 4, end + 4],
                    [begin, end + random.choice(HUGE)],
                    [0, len(body)],
                    [begin],
                    [random.choice(JUNK), end],
                    random.choice(JUNK),
                ]
            )
        case 3:
            del table[name]
        case 4:
            renamed = random.choice(
                ("", "x", "y" * 5000, "\ud800", f"{name}.extra", "__metadata__")
            )
            table = {renamed if key == name else key: value for key, value in table.items()}
        case 5:
            table["__metadata__"] = random.choice((*JUNK, {"a": random.choice(JUNK)}))
        case 6:
            del entry[random.choice(list(entry))]
        case 7:  # a tensor beside the others, of a name that may be taken
            extra = random.randbytes(2 * (end - begin))
            again = {**entry, "data_offsets": [len(body), len(body) + end - begin]}
            other = random.choice((name, "extra", name.replace("layers.0", "layers.9")))
            text = as_text(table)[:-1] + b"," + as_text({other: again})[1:]
            return joined(text, body + extra[: end - begin])
        case _:  # the same, in place of the first's own bytes
            shorter = {**entry, "data_offsets": [begin, begin], "shape": [0]}
            text = as_text({name: shorter})[:-1] + b"," + as_text(table)[1:]
            return joined(text, body)
    return joined(as_text(table), body)


def whole_header(random, contents):
    """Another header altogether, or the same with white space around it."""
    table, body = split(contents)
    text = as_text(table)
    choices = (*DEEP, as_text(random.choice(JUNK)), b"\xff" * 9, b"", text + b" " * 9, b" " + text)
    return joined(random.choice(choices), body)


def index_text(random, contents):
    """An index with wrong kinds, names that lead elsewhere, or no JSON at all."""
    raw = json.loads(contents)
    weight_map = raw["weight_map"]
    key = random.choice(list(weight_map))
    names = ("../x", "/etc/passwd", "x" * 5000, ".", "", "config.json", "a/b", "\0", *JUNK)
    match random.randrange(7):
        case 0:
            weight_map[key] = random.choice(names)
        case 1:
            raw["weight_map"] = random.choice((*JUNK, list(weight_map.values())))
        case 2:
            del raw["weight_map"]
        case 3:
            return random.choice((*DEEP, as_text(random.choice(JUNK)), b"\xff\xfe", b""))
        case 4:
            return contents[: random.randrange(len(contents))]
        case 5:
            weight_map[random.choice(("x", "y" * 5000, ""))] = random.choice(names)
        case _:
            raw["weight_map"] = dict.fromkeys(weight_map, random.choice(list(weight_map.values())))
    return as_text(raw)


def mutate(random, folder):
    """Change one or two files of a folder, and say which."""
    changed = []
    for _ in range(random.randint(1, 2)):
        weights = sorted(folder.glob("model*.safetensors"))
        index = folder / INDEX
        if not weights or not all(path.is_file() for path in weights):
            break
        if index.is_file() and random.random() < 0.4:
            index.write_bytes(index_text(random, index.read_bytes()))
            changed.append(INDEX)
            break
        path = random.choice(weights)
        changed.append(path.name)
        action = random.random()
        if action < 0.1:
            path.unlink()
            match random.randrange(5):
                case 0:
                    path.mkdir()
                case 1:
                    path.symlink_to(path)
                case 2:
                    os.mkfifo(path)
                case 3 if len(weights) > 1:
                    shutil.copy(next(other for other in weights if other != path), path)
            break
        contents = path.read_bytes()
        kind = random.choice((bytes_of_file, entry_of_header, entry_of_header, whole_header))
        path.write_bytes(kind(random, contents))
        if kind is not entry_of_header:
            break  # what is no table any more cannot be edited as one
    return changed


def leaves_in(folder):
    checkpoint = open_hf_checkpoint(folder)
    leaves = iter_hf_leaves(checkpoint, checkpoint.stored_dtype)
    return checkpoint.config, {name: (leaf.dtype, leaf.tobytes()) for name, leaf in leaves}


def check_inputs(numbers, tmp_path):
    """Refuse each input in a sentence, or load it as the original; the share that was refused."""
    originals = {case: leaves_in(FIXTURES / case) for case in CASES}
    refused = tried = 0
    for number in numbers:
        tried += 1
        generator = random.Random(number)
        case = generator.choice(CASES)
        folder = shutil.copytree(FIXTURES / case, tmp_path / case)
        changed = mutate(generator, folder)
        try:
            assert leaves_in(folder) == originals[case], f"input {number}: other weights"
        except SsdJaxError as error:
            refused += 1
            assert_sentence(number, error, folder, *changed, "model.safetensors", INDEX)
            if number % 50 == 0:  # and a conversion leaves nothing
                with pytest.raises(SsdJaxError):
                    convert(folder, tmp_path / "out")
                assert [path.name for path in tmp_path.iterdir()] == [case]
        except Exception as error:
            raise AssertionError(f"input {number} ({case}, {changed}): {error!r:.500}") from error
        shutil.rmtree(folder)
    return refused / tried


def test_malformed_files_are_refused_or_change_nothing(tmp_path):
    assert 0.6 < check_inputs(numbered(300), tmp_path) < 1


@pytest.mark.slow
def test_ten_thousand_malformed_files(tmp_path):
    check_inputs(numbered(SLOW_COUNT), tmp_path)


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path / "llama")
    path = folder / "model.safetensors"
    table, body = split(path.read_bytes())
    name = "model.norm.weight"
    begin, end = table[name]["data_offsets"]
    again = {**table[name], "data_offsets": [len(body), len(body) + end - begin]}
    text = as_text(table)[:-1] + b"," + as_text({name: again})[1:]
    path.write_bytes(joined(text, body + bytes(end - begin)))
    with pytest.raises(SsdJaxError, match=r"model\.safetensors"):
        load_checkpoint(folder)
