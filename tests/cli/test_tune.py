import dataclasses
import json
import tomllib

import jax
import numpy as np
import pytest
from tuning_cases import times, tuned

from ssd_jax.cli.main import _build_parser
from ssd_jax.cli.parser import fill_in
from ssd_jax.cli.speculation import open_speculation
from ssd_jax.cli.tune import PROMPTS
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut
from ssd_jax.model import load_model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.tuning import measuring, tune
from ssd_jax.tuning.speed import Behaviour, Outcomes, Setting, predict
from ssd_jax.tuning.tuned_file import Choice, read_tuned, write_tuned

NEURAL = Choice(
    draft_len=2,
    fan_out_after_hit=(2, 1, 1),
    fan_out_after_miss=(3, 0, 0),
    fallback="neural",
    miss_weight=1.0,
)


@pytest.fixture(autouse=True)
def jax_runs():
    """JAX has its devices, so that no command line divides the CPU of the whole test process."""
    jax.devices()


@pytest.fixture
def ssd(tiny_checkpoint, generate):
    """`generate --method ssd` with the tiny model as its own draft."""
    return lambda *argv: generate(
        "the cat", "--method", "ssd", "--draft-model", str(tiny_checkpoint), *argv
    )


@pytest.fixture
def tuned_file(tmp_path):
    """Writes a tuned file, some of it changed."""

    def write(**changes):
        path = tmp_path / "tuned.toml"
        write_tuned(path, dataclasses.replace(tuned(), **{"choice": NEURAL, **changes}))
        return path

    return write


@pytest.fixture
def small_search(monkeypatch):
    """Short drafts and few guesses, so that little is compiled."""
    monkeypatch.setattr(measuring, "LONGEST_DRAFT", 2)
    monkeypatch.setattr(measuring, "WIDE", 2)
    monkeypatch.setattr(measuring, "_SHAPES", ((1, 1), (2, 1), (2, 2)))
    monkeypatch.setattr(measuring, "MISS_WEIGHTS", (0.5,))
    monkeypatch.setattr(measuring, "REPEATS", 1)


@pytest.fixture
def opened(tiny_checkpoint, capsys):
    """The options that a command line makes, and what it says on stderr; nothing is decoded."""

    def call(*argv):
        models = ("--model", tiny_checkpoint, "--draft-model", tiny_checkpoint)
        line = ("generate", "the cat", "--method", "ssd", *models, *argv)
        parser, flags = _build_parser("generate")
        args = fill_in(parser.parse_args([str(word) for word in line]), flags, {})
        ssd = open_speculation(args, load_model(tiny_checkpoint), SamplingParams())
        return ssd, capsys.readouterr().err

    return call


@pytest.fixture
def told(monkeypatch):
    """Measuring answers at once: accurate drafts, and settings that come out as predicted."""
    accepted = np.array([10, 20, 30])
    outcomes = Outcomes(
        accepted=accepted, hits_by_rank=np.stack([accepted - 4, [1, 1, 1]], 1), lookups=60
    )
    seen = Behaviour(after_hit=outcomes, after_miss=outcomes, foretold=(True, True))
    measured = times(
        verify_s=(0.01,) * 3, neural_s=(0.0, 0.001), ngram_s=0.01, prepare_s=(0.0, 0.0, 0.0005)
    )

    def come_out(model, ssd, setting, times, prompts, params, *, batch_size):
        return predict(times, seen.shortened(setting.draft_len), setting, batch_size)

    monkeypatch.setattr(tune, "measure_times", lambda *args, **options: measured)
    monkeypatch.setattr(tune, "measure_behaviour", lambda *args: seen)
    monkeypatch.setattr(tune, "measure_setting", come_out)
    return measured


def test_tune_writes_what_it_chose(run, told, opened, tiny_checkpoint, tmp_path):
    path, prompts = tmp_path / "tuned.toml", tmp_path / "prompts.jsonl"
    prompts.write_text('"the dog sat"\n\n{"prompt": "the cat", "more": 1}\n')
    models = ("--model", tiny_checkpoint, "--draft-model", tiny_checkpoint)
    outcome = run("tune", *models, "--prompts", prompts, "--out", path)
    assert outcome.code == 0, outcome.err
    again = run("tune", *models, "--out", path, "--prompts", prompts, "--quiet")
    assert (again.code, again.err) == (0, "")
    written = read_tuned(path)
    assert written.times == told
    assert written.measured.num_prompts == 2
    # Two tokens pay, n-grams take longer, and all six guesses fit: 2 * 6 * 0.5 ms of 10 ms.
    assert written.choice.setting == Setting(
        draft_len=2, fan_out=FanOut(after_hit=(2, 2, 2), after_miss=(2, 2, 2)), fallback="neural"
    )
    assert written.expected.crossover_batch == float("inf")
    assert written.expected.autoregressive_tokens_per_s == pytest.approx(100)
    table = outcome.out.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["draft_len", "1", "*"]
    assert table[3].startswith("chosen: draft_len 2, fan-out 2,2,2 (after a miss 2,2,2), neural")
    assert f"--tuned {path}" in table[4]
    ssd, err = opened("--tuned", path)
    assert (ssd.draft_len, ssd.fan_out.after_hit, err) == (2, (2, 2, 2), "")


@pytest.mark.slow
def test_tune_writes_what_generate_reads(
    run, ssd, generate, small_search, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("ssd_jax.cli.busy.LINE_DELAY_S", 0.01)
    path, prompts = tmp_path / "tuned.toml", tmp_path / "prompts.jsonl"
    prompts.write_text('"the dog sat"\n\n{"prompt": "the cat", "more": 1}\n')
    models = ("--model", tiny_checkpoint, "--draft-model", tiny_checkpoint)
    outcome = run(
        "tune",
        *models,
        "--prompts",
        prompts,
        "--out",
        path,
        "--max-tokens",
        "12",
        "--verification",
        "rejection",
        "--temperature",
        "0.8",
    )
    assert outcome.code == 0, outcome.err
    assert "draft_len" in outcome.out
    assert f"--tuned {path}" in outcome.out
    assert "timing the parts of a round ..." in outcome.err
    assert "miss_weight 0.5" in outcome.err
    written = read_tuned(path)
    assert written.measured.num_prompts == 2
    assert written.measured.verification == "rejection"
    assert written.choice.draft_len in (1, 2)
    assert len(written.times.verify_s) == 3
    assert list(tomllib.loads(path.read_text())) == [
        "schema", "choice", "expected", "times", "outcomes", "measured",
    ]  # fmt: skip
    decoded = ssd("--tuned", path, "--verification", "rejection")
    assert decoded.code == 0, decoded.err
    assert decoded.out == generate("the cat").out


def test_flags_win_over_the_tuned_file(opened, tuned_file):
    path, after_hit = tuned_file(), NEURAL.fan_out_after_hit

    def made(*argv):
        ssd, _ = opened("--tuned", path, *argv)
        return ssd.draft_len, ssd.fan_out.after_hit, ssd.fan_out.after_miss, ssd.fallback

    assert made() == (2, after_hit, NEURAL.fan_out_after_miss, "neural")
    assert made("-k", "2") == made()
    assert made("-f", "5") == (2, (5, 5, 5), (5, 5, 5), "neural")
    assert made("--fan-out-after-miss", "9,0,0") == (2, after_hit, (9, 0, 0), "neural")
    assert made("-k", "1") == (1, (3, 3), (3, 3), "neural")  # its fan-out is for its draft_len
    assert made("--fallback", "ngram")[-1] == "ngram"


def test_generate_warns_when_the_draft_sets_the_pace(opened, tuned_file):
    slow = times(verify_s=(0.001,) * 3, prepare_s=(0.0, 0.0, 0.0002))
    path = tuned_file(times=slow)
    assert opened("--tuned", path)[1] == (
        "ssd-jax: warning: the draft sets the pace: preparing 4 outcomes of 2 tokens takes 1.60 ms "
        "and verifying 1.00 ms (by the times in the tuned file); 2 would fit.\n"
    )
    assert opened("--tuned", path, "--quiet")[1] == ""
    assert opened("--tuned", path, "-f", "1,0,1")[1] == ""
    assert opened("--tuned", tuned_file())[1] == ""


def test_a_tuned_miss_weight_needs_its_verification(opened, tuned_file):
    path = tuned_file(choice=dataclasses.replace(NEURAL, miss_weight=0.5))
    with pytest.raises(RequestError, match="is for --verification rejection, got coupled"):
        opened("--tuned", path)
    assert opened("--tuned", path, "--miss-weight", "1")[0].miss_weight == 1
    assert opened("--tuned", path, "--verification", "rejection")[0].miss_weight == 0.5


def test_timeline_as_trace(ssd, tmp_path):
    path = tmp_path / "rounds.json"
    outcome = ssd("-k", "2", "--timeline", path)
    assert outcome.code == 0, outcome.err
    assert " rounds of " in outcome.err
    assert "overlap efficiency" in outcome.err
    assert outcome.out == ssd("-k", "2").out
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == 3 * 4  # 12 tokens, all drafted ones accepted


def test_timeline_as_picture(ssd, tmp_path):
    path = tmp_path / "rounds.png"
    assert ssd("-k", "2", "--timeline", path, "--quiet").err == ""
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("--method", "ssd", "--timeline", "a.gif"), "--timeline takes a .png"),
        (("--timeline", "a.png"), "--timeline shows the rounds of --method ssd"),
        (("--tuned", "a.toml"), "--method ar guesses no outcomes: leave out --tuned"),
        (("--method", "ssd", "--tuned", "no such file"), "The tuned file no such file cannot"),
    ],
)
def test_what_does_not_go_together_is_refused(generate, argv, fragment):
    outcome = generate("the cat", *argv)
    assert outcome.code == 2
    assert fragment in outcome.err


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        ((), "--out"),
        (("--out", "no such folder/a.toml"), "--out should be in a folder that exists"),
        (("--out", "a.toml", "--batch-size", "0"), "--batch-size should be 1 or more, got 0"),
        (("--out", "a.toml", "--prompts", "none"), "Prompts should be in a readable UTF-8 file"),
        (("--out", "a.toml", "--max-tokens", "99999"), "No prompt leaves room for 99999 tokens"),
    ],
)
def test_tune_refuses_what_it_cannot_do(
    run, tiny_checkpoint, tmp_path, monkeypatch, argv, fragment
):
    monkeypatch.chdir(tmp_path)
    models = ("--model", tiny_checkpoint, "--draft-model", tiny_checkpoint)
    outcome = run("tune", *models, *argv)
    assert outcome.code == 2
    assert fragment in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_bundled_prompts_are_several():
    assert len(set(PROMPTS)) == len(PROMPTS) > 3
