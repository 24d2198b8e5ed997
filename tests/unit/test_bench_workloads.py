import ast
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

from bench.methods import parse_method
from bench.record import write_record
from bench.workloads import (
    library_functions,
    own_workload,
    renaming_prompt,
    repeated_share,
)
from ssd_jax.errors import ConfigError, RequestError
from ssd_jax.fan_out import FanOut

tokens = st.lists(st.integers(0, 2), max_size=24)


def share_by_definition(prompt, answer, run):
    """Every answer token, every run that could cover it, every place of the prompt."""
    text = prompt + answer
    copied = 0
    for position in range(len(prompt), len(text)):
        starts = range(max(0, position - run + 1), position + 1)
        copied += any(
            text[start : start + run] == prompt[place : place + run]
            for start in starts
            if start + run <= len(text) and start + run > len(prompt)
            for place in range(len(prompt) - run + 1)
        )
    return copied / len(answer) if answer else 0.0


@given(prompt=tokens, answer=tokens, run=st.integers(1, 5))
def test_repeated_share_is_that_of_the_definition(prompt, answer, run):
    assert repeated_share(prompt, answer, run) == share_by_definition(prompt, answer, run)


def test_repeated_share_counts_runs_that_begin_in_the_prompt():
    prompt = [1, 2, 3, 4, 5, 9, 1, 2]
    assert repeated_share(prompt, [3, 4, 5, 7], run=3) == 0.75
    assert repeated_share(prompt, [3, 4, 5, 7], run=6) == 0


def test_own_workload_refuses_an_unknown_name():
    with pytest.raises(RequestError, match=r"copy-heavy.*'chess'"):
        own_workload("chess")


@pytest.mark.parametrize("name", ["stdlib-continue", "copy-heavy", "nothing-repeats"])
def test_own_workload_has_many_different_prompts_in_a_fixed_order(name):
    prompts = own_workload(name).prompts
    assert len(prompts) == len(set(prompts)) >= 16
    assert own_workload(name).prompts == prompts


def test_renaming_prompt_numbers_whole_names_only():
    name, source = "grow", "def grow(n):\n    return grow(n) + regrow.grow\n"
    prompt = renaming_prompt(name, source, 2)
    assert prompt.endswith("\n\ndef grow_2(n):\n")
    tree = ast.parse(prompt + "    pass\n")
    assert [getattr(node, "name", None) for node in tree.body] == ["grow_0", "grow_1", "grow_2"]
    assert "regrow.grow_0" in prompt
    assert "grow(" not in prompt


def test_library_functions_are_of_the_length_asked_for():
    functions = library_functions(60, 350)
    assert functions
    for name, source in functions:
        assert 60 <= len(source) <= 350
        assert ast.parse(source).body[0].name == name


def test_write_record_replaces_a_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    write_record({"schema": 1}, path)
    assert json.loads(path.read_text()) == {"schema": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_write_record_names_a_file_it_cannot_write(tmp_path):
    with pytest.raises(ConfigError, match="record"):
        write_record({}, tmp_path / "absent" / "record.json")


def test_parse_method_reads_options():
    method = parse_method("ngram:kind=mod,n=5,max=9,min=2,accept=0.5", None, None)
    ngram = method.speculation.ngram
    assert (ngram.kind, ngram.n, ngram.max_draft, ngram.min_draft) == ("mod", 5, 9, 2)
    assert method.speculation.synthetic_acceptance == 0.5
    assert parse_method("wide:k=3", None, None).speculation.widths == (4,)
    assert parse_method("ar", None, None).speculation is None


def test_parse_method_reads_ssd():
    draft = tiny("qwen3").model
    method = parse_method("ssd:k=2,f=3-1-2,miss=4-1-1,fallback=ngram", None, draft)
    assert method.speculation.speculator.fan_out == FanOut(
        after_hit=(3, 1, 2), after_miss=(4, 1, 1)
    )
    assert (method.speculation.draft_len, method.speculation.fallback) == (2, "ngram")
    assert parse_method("ssd:k=2,f=2", None, draft).speculation.fan_out.after_hit == (2, 2, 2)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("chess", "'chess'"),
        ("ar:k=2", "'k'"),
        ("ngram:k=2", "'k'"),
        ("ngram:max=2.5", "'2.5'"),
        ("ngram:auto=1", "'1'"),
        ("ngram:kind=tree", "'tree'"),
        ("wide:k=0", "0"),
    ],
)
def test_parse_method_refuses_what_it_does_not_know(name, complaint):
    with pytest.raises(RequestError, match=complaint):
        parse_method(name, None, None)
