import json
from pathlib import Path

import jax
import pytest

from ssd_jax.cli.doctor import describe_briefly

ROOT = Path(__file__).parents[2]


def test_json_has_all_findings(run, tmp_path):
    (tmp_path / "program").write_bytes(b"12345")
    outcome = run("doctor", "--json", SSD_JAX_COMPILATION_CACHE=str(tmp_path), SSD_JAX_TOP_K="3")
    findings = json.loads(outcome.out)
    assert outcome.code == 0
    assert findings["versions"]["jax"] == jax.__version__
    assert len(findings["devices"]) == len(jax.devices())
    for device in findings["devices"]:
        assert device["platform"] == jax.devices()[0].platform
        assert 0 < device["memory_free"] <= device["memory_total"]
    assert {
        "op": "decode_attention",
        "implementation": "xla_blocks",
        "status": "chosen",
    } in findings["kernels"]
    assert findings["compilation_cache"] == {
        "folder": str(tmp_path),
        "bytes": 5,
        "writable": True,
    }
    assert findings["demo"].keys() == {"target", "draft"}
    assert findings["variables"]["SSD_JAX_TOP_K"] == "3"
    assert findings["problems"] == []


@pytest.mark.parametrize("option", ["--verbose", "--no-verbose"])
def test_text_names_what_the_json_holds(run, tmp_path, option):
    outcome = run("doctor", "--compilation-cache", tmp_path, option)
    assert outcome.code == 0
    for words in (f"jax {jax.__version__}", ": cpu, cpu, ", str(tmp_path), "no problems found"):
        assert words in outcome.out.replace("\n  ", " ")


def test_all_is_on_one_screen(run, tmp_path):
    lines = run("doctor", "--compilation-cache", "off").out.splitlines()
    assert len(lines) <= 24
    assert max(len(line) for line in lines if str(ROOT) not in line) <= 80
    findings = json.loads(run("doctor", "--json").out)
    for name in {kernel["implementation"] for kernel in findings["kernels"]} - {"xla"}:
        assert sum(line.startswith(f"kernel {name}") for line in lines) == 1


def test_verbose_has_every_kernel_and_device(run):
    lines = run("doctor", "--verbose").out.splitlines()
    findings = json.loads(run("doctor", "--json", "--verbose").out)
    for kernel in findings["kernels"]:
        assert f"kernel {kernel['op']}/{kernel['implementation']}: {kernel['status']}" in lines
    assert sum(line.startswith("device ") for line in lines) == len(jax.devices())


def test_devices_and_kernels_of_a_kind_share_a_line():
    gpu = {"platform": "gpu", "kind": "NVIDIA H100", "memory_total": 80 * 2**30}
    free = (70, 60, 65)
    findings = {
        "versions": {"jax": "1"},
        "cpu_count": 8,
        "devices": [
            {**gpu, "id": number, "memory_free": size * 2**30} for number, size in enumerate(free)
        ],
        "kernels": [
            {"op": op, "implementation": name, "status": status}
            for op in ("attention", "decode_attention")
            for name, status in (
                ("mosaic_sm100", "needs a GPU of sm_100, and this device is sm_90"),
                ("mosaic_sm90", "chosen"),
                ("xla", "next choice"),
            )
        ],
        "compilation_cache": {"folder": None, "bytes": 0, "writable": False},
        "demo": {"target": None, "draft": "here"},
        "variables": {"SSD_JAX_TOP_K": "3"},
        "problems": ["It is broken."],
    }
    assert describe_briefly(findings).splitlines() == [
        "jax 1",
        "8 CPU cores",
        "devices 0, 1, 2: gpu, NVIDIA H100, 60.0 GiB of 80.0 GiB free or more on each",
        "kernel mosaic_sm90 runs attention, decode_attention",
        "kernel mosaic_sm100 (2 ops): needs a GPU of sm_100, and this device is sm_90",
        "compilation cache: off",
        "demo target: missing",
        "demo draft: here",
        "SSD_JAX_TOP_K=3",
        "problem: It is broken.",
        "--verbose lists every device and kernel, --json is for programs",
    ]


def test_an_unwritable_cache_is_a_problem(run, tmp_path):
    (tmp_path / "file").touch()
    outcome = run("doctor", "--compilation-cache", tmp_path / "file" / "cache")
    assert outcome.code == 1
    assert "problem: The compilation cache" in outcome.out


@pytest.mark.parametrize("option", ["--json", "--no-json"])
def test_no_device_is_a_problem(run, monkeypatch, option):
    def fail():
        raise RuntimeError("no backend here")

    monkeypatch.setattr(jax, "devices", fail)
    outcome = run("doctor", option)
    assert outcome.code == 1
    assert "no backend here" in outcome.out
