"""The report of a comparison, from answers by hand."""

import json

import pytest

from bench import report
from bench.peers.compare import Results, Turns
from bench.peers.contenders import parse_contender
from bench.peers.protocol import Answer
from bench.peers.report import contender_table, describe_peers
from bench.peers.resuming import SCHEMA, add_results
from ssd_jax.errors import RequestError

ENVIRONMENT = {
    "device_kind": "cpu",
    "platform": "cpu",
    "cpus": 1,
    "jax": "0",
    "commit": None,
    "date": "today",
}


def turns(seconds, tokens=(1, 2, 3), text=None, drafted=None, accepted=None):
    output = Answer(
        tokens=None if tokens is None else list(tokens),
        text=text,
        first_s=0.01,
        decode_s=1.0,
        decode_tokens=2,
        drafted=drafted,
        accepted=accepted,
    )
    timed = Answer(tokens=None, first_s=0.02, decode_s=seconds, decode_tokens=2)
    return Turns(output=output, timed=(timed,))


def record(contenders, **changes):
    plan = {
        "model": "demo",
        "draft_model": "demo",
        "dtype": "float32",
        "threads": 1,
        "prompts": "own.jsonl",
        "max_tokens": 3,
        "rounds": 1,
    }
    made = {
        "kind": "peers",
        "schema": SCHEMA,
        "environment": ENVIRONMENT,
        "plan": plan,
        "target_parameters": 7_300_000,
        "versions": {"ours": {"jax": "0.12"}, "llama.cpp": {"llama.cpp": "version: 7"}},
        "skipped": {},
    }
    results = Results(
        turns={parse_contender(name): tuple(done) for name, done in contenders.items()},
        failed={parse_contender("llama.cpp/ngram-mod"): "it broke."},
    )
    prompts = [[0] * 4, [0] * 5]
    add_results(made, results, prompts, lambda ids: "".join(map(str, ids)))
    return {**made, **changes}


SAME = {
    "ours/ar": [turns(0.02), turns(0.02)],
    "ours/draft:k=3": [turns(0.01), turns(0.02)],
    "llama.cpp/plain": [turns(0.04), turns(0.01)],
    "llama.cpp/draft:k=3": [turns(1.0, drafted=8, accepted=4), turns(1.0, drafted=2, accepted=1)],
    "server/plain": [turns(0.04, None, "123"), turns(0.04, None, "123")],
}


def test_the_table_has_every_contender_and_the_fastest_of_each_bold():
    lines = contender_table(record(SAME)).splitlines()
    assert len(lines) == 2 + len(SAME)
    assert "| ssd-jax | ar | 100 | 1.00 | 1.00 to 1.00 | 20.0 |  | 0 |" in lines
    assert "| ssd-jax | draft:k=3 | **133** | 1.33 | 1.00 to 2.00 | 20.0 |  | 0 |" in lines
    assert "| llama.cpp | plain | **80.0** | 0.80 | 0.50 to 2.00 | 20.0 |  | 0 |" in lines
    assert "| llama.cpp | draft:k=3 | 2.0 | 0.02 | 0.02 to 0.02 | 20.0 | 50% | 0 |" in lines


def test_the_report_says_what_was_compared_and_who_was_not():
    text = "\n".join(describe_peers(record(SAME, skipped={"transformers": "no program."})))
    assert (
        "Target demo (7.3 M weights); draft demo; float32; 2 prompts of own.jsonl, 4 to 5" in text
    )
    assert "With jax 0.12, llama.cpp 7." in text
    assert "All outputs of all contenders are the same, token for token (a server" in text
    assert "- 1.67 times llama.cpp/plain (over prompts 0.50 to 4.00;" in text
    assert "- transformers was skipped: no program." in text
    assert "- llama.cpp/ngram-mod was left out: it broke." in text


def test_outputs_that_differ_are_named():
    other = {**SAME, "llama.cpp/plain": [turns(0.04), turns(0.01, (1, 2, 4))]}
    text = "\n".join(describe_peers(record(other)))
    assert "The outputs of ours/ar, ours/draft:k=3, llama.cpp/draft:k=3, server/plain are" in text
    assert (
        "- llama.cpp/plain: 1 of 2 outputs differ from our plain decoding's, first after 2" in text
    )


def test_a_comparison_that_has_only_begun_has_no_table():
    begun = record(SAME, units=[])
    text = "\n".join(describe_peers(begun))
    assert "0 prompts of own.jsonl" in text
    assert "| engine |" not in text


def test_the_command_prints_or_writes(tmp_path, capsys):
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(record(SAME, complete=False)))
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# peers\n")
    assert "**not complete**" in printed
    assert contender_table(json.loads(path.read_text())) in printed
    assert report.main([str(path), "--out", str(tmp_path / "report"), "--no-plots"]) == 0
    assert (tmp_path / "report" / "report.md").read_text() == printed
    path.write_text(json.dumps(record(SAME, schema=1)))
    with pytest.raises(RequestError, match=f"should have schema {SCHEMA}, got 1"):
        report.main([str(path)])
