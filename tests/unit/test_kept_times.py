import dataclasses
import json
import math
import os
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from tiny_models import CONFIGS, make_tiny

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.errors import ConfigError
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.tuning import kept_times
from ssd_jax.tuning.kept_times import circumstances, keep_times, read_times, times_file

TIMES = RoundTimes(seconds=((1.0, 2.0, math.inf), (1.0, 0.5, 0.25)))
ABOUT = {"target": "x", "rows": (1, 2)}
GREEDY = SamplingParams()
NGRAM = Speculation(ngram=NgramConfig())


@pytest.fixture(scope="module")
def model():
    return make_tiny(CONFIGS["llama"]).model


def test_what_is_kept_is_read(tmp_path):
    folder = tmp_path / "not" / "there"
    assert read_times(folder, ABOUT) is None
    path = keep_times(folder, ABOUT, TIMES)
    assert path == times_file(folder, ABOUT)
    kept = read_times(folder, ABOUT)
    assert kept is not None
    assert kept.times == TIMES
    assert len(kept.date) == len("2026-01-01")
    assert read_times(folder, {**ABOUT, "target": "y"}) is None


def test_everything_that_matters_makes_another_file(model, monkeypatch, tmp_path):
    def file():
        return times_file(tmp_path, circumstances(model, NGRAM, GREEDY))

    def of(target=model, speculation=NGRAM, params=GREEDY, **options):
        return times_file(tmp_path, circumstances(target, speculation, params, **options))

    bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    elsewhere = jax.device_put(model.params, jax.devices()[1])
    halves = jax.device_put(
        model.params,
        jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec()),
    )
    files = [
        of(),
        of(dataclasses.replace(model, params=bfloat16)),
        of(dataclasses.replace(model, params=elsewhere)),
        of(dataclasses.replace(model, params=halves)),
        of(make_tiny(CONFIGS["qwen3"]).model),
        of(dataclasses.replace(model, config=dataclasses.replace(model.config, max_context=99))),
        of(speculation=Speculation(draft=model)),
        of(speculation=Speculation(draft=make_tiny(CONFIGS["qwen3"]).model)),
        of(speculation=Speculation(draft=model, ngram=NgramConfig())),
        of(speculation=Speculation(draft=model, draft_len=3)),
        of(speculation=Speculation(draft=model, verification="rejection")),
        of(speculation=Speculation(ngram=NgramConfig(kind="map"))),
        of(params=SamplingParams(temperature=0.5)),
        of(params=SamplingParams(temperature=0.5, top_k=3)),
        of(params=SamplingParams(logprobs=1)),
        of(params=SamplingParams(logit_bias={1: 1.0})),
        of(batch_size=2),
    ]
    for name in ("XLA_FLAGS", "OMP_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "7")
            files.append(file())
    for name, value in (("_version", "9"), ("_processor", "another")):
        with monkeypatch.context() as patch:
            patch.setattr(kept_times, name, lambda *args, value=value: value)
            files.append(file())
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
        files.append(file())
    assert len(set(files)) == len(files)


def test_what_does_not_matter_does_not(model, tmp_path):
    def of(params):
        return times_file(tmp_path, circumstances(model, NGRAM, params))

    one = SamplingParams(temperature=0.5, seed=1)
    other = SamplingParams(temperature=0.9, seed=2, max_tokens=3, stop="x", ignore_eos=True)
    assert of(one) == of(other)
    other_weights = make_tiny(CONFIGS["llama"], seed=1).model
    assert circumstances(other_weights, NGRAM, one) == circumstances(model, NGRAM, one)


DAMAGED = (
    lambda content: content | {"schema": 2},
    lambda content: content | {"about": {"target": "x"}},
    lambda content: content | {"seconds": [[1.0], [1.0, 2.0]]},
    lambda content: content | {"seconds": [[-1.0, 2.0]]},
    lambda content: content | {"seconds": [["1.0", 2.0]]},
    lambda content: content | {"seconds": [[True, 2.0]]},
    lambda content: content | {"seconds": [[math.nan, 2.0]]},
    lambda content: content | {"seconds": None},
    lambda content: content | {"seconds": {"a": 1}},
    lambda content: content | {"date": 3},
    lambda content: content | {"date": "yesterday\x1b[2J"},
    lambda content: {name: value for name, value in content.items() if name != "date"},
    lambda content: [content],
)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = keep_times(tmp_path, ABOUT, TIMES)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match="cannot be used; delete it"):
        read_times(tmp_path, ABOUT)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = keep_times(tmp_path, ABOUT, TIMES)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            read_times(tmp_path, ABOUT)


def test_the_oldest_go_and_foreign_files_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_times, "MOST_FILES", 3)
    (tmp_path / "notes.txt").touch()
    abandoned, being_written = tmp_path / ".a.json.x1", tmp_path / ".b.json.x2"
    for path in (abandoned, being_written):
        path.touch()
    os.utime(abandoned, (1, 1))
    paths = []
    for number in range(5):
        paths.append(keep_times(tmp_path, {"number": number}, TIMES))
        age = time.time() - 1000 + number
        os.utime(paths[-1], (age, age))
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt", being_written.name, *(path.name for path in paths[-3:]),
    }  # fmt: skip


def test_who_reads_while_others_write_sees_whole_files(tmp_path):
    keep_times(tmp_path, ABOUT, TIMES)
    writers = [
        threading.Thread(target=lambda: [keep_times(tmp_path, ABOUT, TIMES) for _ in range(50)])
        for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        kept = read_times(tmp_path, ABOUT)
        assert kept is not None
        assert kept.times == TIMES
    for writer in writers:
        writer.join()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        keep_times(tmp_path / "file" / "folder", ABOUT, TIMES)
