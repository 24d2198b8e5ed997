"""The first minutes on a GPU: the script goes through on a CPU, and its own checks can fail."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bench.first_light import report
from bench.first_light.__main__ import main
from bench.first_light.cases import OPS, STAGES, Case, all_cases
from bench.first_light.kernel_values import LSE_ERROR, RMS, by_reference, on_device, relative_rms
from bench.first_light.problems import Problem, problems, solve
from bench.first_light.processes import run_cases

CHILD = """
import time

def right(*, tell, dry_run, figure):
    tell("one", figure)
    tell("two", "hidden", detail=True)

def wrong(*, tell, dry_run):
    tell("three", "off by one", ok=False)

def failing(*, tell, dry_run):
    tell("four", "before it fails")
    raise ValueError("this | is why")

def hanging(*, tell, dry_run):
    tell("five", "before it hangs")
    time.sleep(600)
"""


def test_the_dry_run_goes_through_every_stage(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_light", "--dry-run", "--out", str(tmp_path)],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    record = json.loads((tmp_path / report.JSON_NAME).read_text())
    statuses = {(one["stage"], one["case"]): one["status"] for one in record["cases"]}
    assert set(statuses.values()) == {"passed"}, done.stdout[-4000:]
    assert done.returncode == 0, done.stderr[-2000:]
    assert [stage for stage, _ in statuses] == [case.stage for case in all_cases(dry_run=True)]
    assert {stage for stage, _ in statuses} == set(STAGES)
    assert record["dry_run"]
    assert (tmp_path / report.TABLE_NAME).read_text().count("### ") == len(STAGES)
    assert len(list(tmp_path.glob("timeline_*.png"))) == 1


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Runs cases of a module of functions, and returns what became of each."""
    (tmp_path / "stand_ins.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*cases, seconds=60.0):
        found = []
        run_cases(
            [
                Case(stage="values", function=f"stand_ins:{name}", name=name, **more)
                for name, more in cases
            ],
            dry_run=True,
            workers=2,
            deadline=time.monotonic() + seconds,
            done=found.append,
        )
        return {result["case"]: result for result in found}

    return run


def test_what_hangs_is_killed_and_the_next_cases_run(results):
    started = time.monotonic()
    found = results(
        ("hanging", {"limit_s": 3, "alone": True}),
        ("failing", {}),
        ("wrong", {}),
        ("right", {"options": {"figure": "7 us"}}),
    )
    assert time.monotonic() - started < 30
    assert {name: one["status"] for name, one in found.items()} == {
        "hanging": "timed out",
        "failing": "failed",
        "wrong": "wrong",
        "right": "passed",
    }
    assert found["hanging"]["rows"] == [{"what": "five", "figure": "before it hangs", "ok": True}]
    assert found["failing"]["rows"][0]["what"] == "four"
    assert "ValueError: this | is why" in found["failing"]["log"]
    table = report.as_markdown(found.values())
    assert "| wrong | three | off by one | **wrong** |" in table
    assert "| right | one | 7 us |  |" in table
    assert "hidden" not in table
    assert "| failing |  | ValueError: this \\| is why | **failed** |" in table
    assert "**timed out**" in table


def test_what_has_no_time_left_is_said_to_be_not_run(results):
    (found,) = results(("right", {"options": {"figure": ""}}), seconds=2.0).values()
    assert found["status"] == "not run"
    assert found["rows"] == []


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path):
    from bench.first_light.processes import _read_rows

    path = tmp_path / "rows"
    path.write_text('{"what": "whole", "ok": true}\n{"what": "ha')
    assert _read_rows(path) == [{"what": "whole", "ok": True}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--workers", "-1"], "--workers must be at least 1"),
        (["--only", "everything"], "invalid choice"),
        (["--match", "nothing like it"], "no case is left"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert words in capsys.readouterr().err


def test_names_and_functions_of_the_cases():
    for dry_run in (False, True):
        cases = all_cases(dry_run=dry_run)
        names = [(case.stage, case.name) for case in cases]
        assert len(set(names)) == len(names)
        stages = [case.stage for case in cases]
        assert stages == sorted(stages, key=list(STAGES).index)
    shapes = sum(
        case.options["last"] - case.options["first"]
        for case in all_cases(dry_run=False)
        if case.stage == "values" and case.name.startswith("decode_attention ")
        if "first" in case.options
    )
    assert shapes == 20


def quiet(op, tiny=True) -> Problem:
    """A small problem of an op in which every key weighs something and rows are ragged."""
    found = [one for one in problems(op, 40, tiny=tiny) if one.seed % 3 == 0 and one.ragged]
    return dataclasses.replace(found[0], page_slots=0, causal=False)


def errors(problem, arguments, solved):
    out = np.asarray(by_reference(problem)(arguments, solved.page_table), np.float64)
    return relative_rms(out, solved.out)


@pytest.mark.parametrize("op", OPS)
def test_problems_are_solved_as_the_reference_solves_them(op):
    for problem in problems(op, 4, tiny=True):
        solved = solve(problem, jnp.dtype(problem.dtype))
        arguments = on_device(problem, solved)
        assert errors(problem, arguments, solved) <= RMS[problem.dtype] / 2


@pytest.mark.parametrize("op", OPS)
def test_one_key_too_few_is_seen(op):
    """The integer argument that says what is visible, one less, is far outside the tolerance."""
    problem = quiet(op)
    solved = solve(problem, jnp.dtype(problem.dtype))
    arguments = list(on_device(problem, solved))
    arguments[3] = jnp.maximum(arguments[3] - 1, 0)
    assert not errors(problem, tuple(arguments), solved) <= 2 * RMS[problem.dtype]  # or NaN
    assert np.log(257 / 256) > 10 * LSE_ERROR  # one of the most keys that an edge has


def test_problems_are_the_same_ones_every_time():
    assert problems("verify_attention", 20) == problems("verify_attention", 20)
    works = [one.work for one in problems("attention", 20)]
    assert works == sorted(works)
