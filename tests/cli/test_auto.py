"""`-k auto`: what an earlier run measured is taken, unless it cannot be."""

import os

import pytest

import ssd_jax.cli.speculation as module
from ssd_jax.engine.speculation import RoundTimes


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, which come out as drafting nothing being best."""
    calls = []

    def measure(model, speculation, params):
        calls.append(params)
        rows, columns = len(speculation.names), speculation.longest_draft + 1
        return RoundTimes(seconds=((1.0,) + (1e3,) * (columns - 1),) * rows)

    monkeypatch.setattr(module, "measure_round_times", measure)
    return calls


@pytest.fixture
def auto(generate, measured):
    return lambda *more, **options: generate(
        "the cat", "--method", "ngram", "-k", "auto", *more, **options
    )


@pytest.fixture
def folder(run):
    """Where the times are kept."""
    return module.user_cache(os.environ) / "round-times"


def test_the_next_run_takes_what_was_measured(auto, measured, folder):
    first = auto()
    assert (first.code, len(measured)) == (0, 1)
    (file,) = folder.iterdir()
    assert f"kept for the next run in {file}" in first.err
    second = auto()
    assert (second.code, second.out, len(measured)) == (0, first.out, 1)
    assert f"kept in {file}; --measure-again" in second.err
    assert auto("--quiet").err == ""
    assert len(measured) == 1


def test_other_options_are_measured_by_themselves(auto, measured, folder):
    auto()
    auto("--ngram-kind", "map")
    auto("--temperature", "0.5")
    assert len(measured) == 3
    auto("--temperature", "0.6", "--seed", "3", "--max-tokens", "5")
    assert len(measured) == 3
    assert len(list(folder.iterdir())) == 3


def test_measure_again_does(auto, measured, folder):
    auto()
    (file,) = folder.iterdir()
    file.write_text("{}")
    outcome = auto("--measure-again")
    assert (outcome.code, len(measured)) == (0, 2)
    assert "damaged" not in outcome.err
    assert "seconds" in file.read_text()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema": 1, "seconds": [[1]]}'])
def test_a_damaged_file_is_told_and_written_anew(auto, measured, folder, content):
    auto()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_text(content)
    outcome = auto()
    assert (outcome.code, len(measured)) == (0, 2)
    assert f"{file} is damaged and is written anew." in outcome.err
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning(auto, measured, folder):
    folder.parent.mkdir(exist_ok=True)
    folder.touch()
    outcome = auto("--quiet")
    assert (outcome.code, len(measured)) == (0, 1)
    assert outcome.err.startswith("ssd-jax: warning: round times are not kept: ")


def test_measure_again_without_auto_is_refused(generate):
    outcome = generate("the cat", "--method", "ngram", "--measure-again")
    assert outcome.code == 2
    assert "--measure-again is for -k auto" in outcome.err
