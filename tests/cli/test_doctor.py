import json

import jax
import pytest


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


def test_text_names_what_the_json_holds(run, tmp_path):
    outcome = run("doctor", "--compilation-cache", tmp_path)
    assert outcome.code == 0
    for words in (f"jax {jax.__version__}", "device 0: cpu", str(tmp_path), "no problems found"):
        assert words in outcome.out


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
