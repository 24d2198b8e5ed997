import json
import sys

import pytest
from bench_cases import TIMELINE, fake_unit

import bench.record
import bench.run
from bench.guard import LIMITS, read_limits
from ssd_jax.errors import ConfigError

METHODS = ("draft:k=2", "ssd:k=2,f=2")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('"the dog sat"\n{"prompt": "the cat and"}\n')
    return path


@pytest.fixture
def bench_run(run, tiny_checkpoint, prompts):
    """`ssd-jax bench run` with the tiny model on two prompts."""
    fixed = (
        *("--model", tiny_checkpoint, "--draft-model", tiny_checkpoint),
        *("--workloads", f"own={prompts}", "--num-prompts", "2", "--max-tokens", "10"),
        *("--rounds", "2", "--methods", *METHODS),
    )
    return lambda *argv, **variables: run("bench", "run", *fixed, *argv, **variables)


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured; the names of the methods each time it should have been."""
    calls = []

    def measure_unit(target, methods, batch, **options):
        calls.append([method.name for method in methods])
        for method in methods * (options["rounds"] + 2):
            options["tell"](method.name)
        return fake_unit(calls[-1], float(len(calls)))

    monkeypatch.setattr(bench.run, "measure_unit", measure_unit)
    monkeypatch.setattr(bench.run, "record_timeline", lambda *args: TIMELINE)
    return calls


def test_run_measures_and_report_describes(bench_run, run, tmp_path):
    path = tmp_path / "run.json"
    outcome = bench_run("--out", path, "--host", "--timeline", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads(path.read_text())
    (cell,) = record["cells"]
    assert record["complete"]
    assert (cell["workload"], cell["temperature"], cell["batch"]) == ("own", 0, 1)
    assert len(cell["units"]) == cell["num_units"] == 2
    assert list(cell["methods"]) == ["ar", *METHODS]
    for unit in cell["units"]:
        for name, sample in unit["methods"].items():
            assert sample["num_tokens"] == sum(n for _, n in sample["deliveries"]) == 10
            assert sample["num_differing"] == 0
            assert len(sample["decode_s"]) == len(sample["stream_s"]) == 2
            assert all(decode > first for decode, first in zip(
                sample["decode_s"], sample["first_step_s"], strict=True
            ))  # fmt: skip
            if name != "ar":  # draft and target are one model: every drafted token is accepted
                assert sample["speculation"]["target_steps"] == 4
    ssd = cell["methods"]["ssd:k=2,f=2"]
    assert ssd["outcomes"]["lookups"][0] + ssd["outcomes"]["lookups"][1] == 2 * 3
    assert ssd["tokens_per_target_step"] == 2.5
    assert list(cell["timelines"]) == ["ssd:k=2,f=2"]
    report = run("bench", "report", path, "--out", tmp_path / "report", "--no-plots")
    assert report.code == 0, report.err
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## own, temperature 0, batch 1" in text
    assert all(f"| {name} |" in text for name in ("ar", *METHODS))


def test_the_grid_is_measured_cell_by_cell(bench_run, measured, tmp_path):
    path = tmp_path / "run.json"
    options = ("--temperature", "0", "0.7", "--batch", "1", "2", "--draft-len", "1", "2")
    outcome = bench_run("--out", path, *options, "--methods", "draft")
    assert outcome.code == 0, outcome.err
    cells = json.loads(path.read_text())["cells"]
    found = [(cell["temperature"], cell["batch"], len(cell["units"])) for cell in cells]
    assert found == [(0, 1, 2), (0, 2, 1), (0.7, 1, 2), (0.7, 2, 1)]
    assert measured == [["ar", "draft:k=1", "draft:k=2"]] * 6
    assert "36/36" not in outcome.err  # not a terminal: no bar is drawn over itself
    assert "72/72" in outcome.err


def test_an_interrupted_run_goes_on_where_it_stopped(bench_run, measured, monkeypatch, tmp_path):
    path, real = tmp_path / "run.json", bench.run.measure_unit

    def interrupted(*args, **options):
        if measured:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(bench.run, "measure_unit", interrupted)
    outcome = bench_run("--out", path, "--quiet")
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err
    begun = json.loads(path.read_text())
    assert (begun["complete"], len(begun["cells"][0]["units"])) == (False, 1)
    monkeypatch.setattr(bench.run, "measure_unit", real)
    assert bench_run("--out", path, "--quiet").code == 0
    record = json.loads(path.read_text())
    assert record["complete"]
    assert record["cells"][0]["units"][0] == begun["cells"][0]["units"][0]
    assert (len(measured), len(record["sittings"])) == (2, 2)
    again = bench_run("--out", path, "--quiet")
    assert again.code == 0
    assert "holds the whole run already" in again.err
    assert len(measured) == 2
    other = bench_run("--out", path, "--max-tokens", "11")
    assert other.code == 2
    assert "max_tokens 10, which cannot go on with 11" in other.err


def test_a_full_disk_is_told_and_leaves_what_was_measured(
    bench_run, measured, monkeypatch, tmp_path
):
    path, real = tmp_path / "run.json", bench.record.write_record

    def full(record, path):
        if record["cells"] and len(record["cells"][0]["units"]) == 2:
            raise ConfigError(f"{path} cannot be written (No space left on device).")
        real(record, path)

    monkeypatch.setattr(bench.record, "write_record", full)
    outcome = bench_run("--out", path, "--quiet")
    assert outcome.code == 2
    assert "No space left on device" in outcome.err
    assert "goes on from there" in outcome.err
    assert len(json.loads(path.read_text())["cells"][0]["units"]) == 1


def test_without_a_file_the_record_is_printed(bench_run, measured):
    outcome = bench_run("--quiet")
    assert json.loads(outcome.out)["complete"]


def test_report_draws_what_there_is(bench_run, measured, run, tmp_path):
    path, folder = tmp_path / "run.json", tmp_path / "report"
    bench_run("--out", path, "--quiet", "--timeline", "--batch", "1", "2")
    assert run("bench", "report", path, "--out", folder).code == 0
    pictures = {file.name for file in folder.glob("*.png")}
    kinds = ("speed", "hits", "acceptance", "batch", "rounds")
    assert pictures == {f"run-{kind}.png" for kind in kinds}
    text = (folder / "report.md").read_text()
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"({picture.name})" in text
    assert "| ssd:k=2,f=2 | 4.00 | 3.00 | 2.00 | 0.10 |  | 90% |" in text


def test_report_describes_microbenchmarks(run, tmp_path):
    result = {"median_s": 2e-6, "min_s": 1e-6, "max_s": 3e-6}
    environment = {"device_kind": "cpu", "platform": "cpu", "cpus": 2, "jax": "0", "commit": None}
    record = {
        "kind": "micro",
        "schema": 1,
        "environment": {**environment, "date": "today"},
        "parts": {
            "tree": {
                "what": "Preparing.",
                "axis": "branches",
                "results": [{"at": "1", **result}, {"at": "2", **result, "median_s": 5e-6}],
            }
        },
    }
    path = tmp_path / "micro.json"
    path.write_text(json.dumps(record))
    assert run("bench", "report", path, "--out", tmp_path / "report").code == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| 2 | 5.0 | 1.0 to 3.0 | 2.50 |" in text


def test_guard_judges_a_record(bench_run, measured, run, tmp_path):
    path, worse = tmp_path / "run.json", tmp_path / "worse.json"
    bench_run("--out", path, "--quiet", "--timeline")
    outcome = run("bench", "guard", "--record", path)
    assert outcome.code == 1
    limit = read_limits(LIMITS)["speculation/ar"]
    assert f"speculation/ar 1.000, at least {limit:.3f}: NOT KEPT" in outcome.out
    assert "overlap efficiency 0.900" in outcome.out
    assert run("bench", "guard", "--record", path, "--against", path).code == 0
    record = json.loads(path.read_text())
    record["cells"][0]["methods"]["draft:k=2"]["decode_ratio_to_ar"] = 0.5
    worse.write_text(json.dumps(record))
    assert run("bench", "guard", "--record", worse, "--against", path).code == 1
    refused = run("bench", "guard")
    assert (refused.code, "Give --record" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("--workloads", "chess"), "A workload must be one of"),
        (("--methods", "chess"), "A method must be one of"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--workloads", "random"), "needs methods with accept=RATE"),
        (("--max-tokens", "99999"), "No prompt of own fits"),
        (("--out", "no such folder/run.json"), "cannot be written"),
        (("--batch", "9"), "must fill the largest batch"),
        (("--num-prompts", "9", "--batch", "9"), "own should fill a batch of 9, got 2"),
        (("--shuffle",), "unrecognized arguments: --shuffle"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench_run, measured, argv, fragment):
    outcome = bench_run(*argv, "--quiet")
    assert outcome.code == 2
    assert fragment in outcome.err
    assert measured == []


def test_flags_are_variables_too(bench_run, measured):
    outcome = bench_run("--quiet", SSD_JAX_TEMPERATURE="[0.5]", SSD_JAX_BATCH="2")
    (cell,) = json.loads(outcome.out)["cells"]
    assert (cell["temperature"], cell["batch"]) == (0.5, 2)


@pytest.mark.parametrize("tool", ["run", "report", "micro", "guard", "peers"])
def test_every_tool_has_help(run, tool):
    outcome = run("bench", tool, "--help")
    assert outcome.code == 0
    assert f"usage: ssd-jax bench {tool}" in outcome.out


def test_without_the_repository_the_benchmarks_are_not_there(run, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = run("bench", "run")
    assert outcome.code == 2
    assert "which is in the repository and not in the installed package" in outcome.err
    assert "in a clone" in outcome.err


def test_bench_refuses_an_unknown_tool(run):
    outcome = run("bench", "cook")
    assert outcome.code == 2
    assert "invalid choice" in outcome.err
