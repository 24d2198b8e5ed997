import json

import numpy as np
import pytest
from tiny_models import tiny, tiny_tokenizer

from bench.methods import expand_grid, parse_method
from bench.plan import Plan, describe_workload, open_record, refuse_guesses
from bench.prompt_sets import BUNDLED, FROM_FILE, encode_prompt, fingerprint, open_workload
from bench.record import SCHEMA, read_record, require_run, write_record
from bench.workloads import Workload
from ssd_jax.errors import RequestError
from ssd_jax.model import Model


def plan(**changes):
    usual = {
        "model": "demo",
        "draft_model": "demo",
        "dtype": None,
        "split": False,
        "idle_layers": (0, 0),
        "methods": ("ar", "draft"),
        "workloads": (describe_workload(open_workload("math")),),
        "temperatures": (None, 0.5),
        "batches": (1, 2),
        "num_prompts": 4,
        "max_tokens": 8,
        "rounds": 1,
        "host": False,
        "timeline": False,
    }
    return Plan(**{**usual, **changes})


def tokenized() -> Model:
    bare = tiny("llama").model
    return Model(config=bare.config, params=bare.params, tokenizer=tiny_tokenizer())


def test_expand_grid_adds_what_a_name_does_not_say():
    names = ["draft", "ngram:kind=mod", "combined:k=9", "ssd:f=2", "ssd:k=3,f=1", "ar", "wide:k=4"]
    assert expand_grid(names, ["2", "4"], ["3"]) == (
        "ar",
        "draft:k=2",
        "draft:k=4",
        "ngram:kind=mod,max=2",
        "ngram:kind=mod,max=4",
        "combined:k=9",
        "ssd:f=2,k=2",
        "ssd:f=2,k=4",
        "ssd:k=3,f=1",
        "wide:k=4",
    )
    assert expand_grid(["ssd", "ssd"], [], ["1", "4-3-2"]) == ("ar", "ssd:f=1", "ssd:f=4-3-2")
    assert expand_grid(["ssd"], ["2"], ["1", "3"]) == ("ar", "ssd:k=2,f=1", "ssd:k=2,f=3")


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_workloads_have_many_different_prompts(name):
    workload = open_workload(name)
    assert len(set(workload.prompts)) == len(workload.prompts) >= 12
    assert workload.source == "bundled"


@pytest.mark.parametrize("name", FROM_FILE)
def test_workloads_from_files(name, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "How many?"}\n')
    workload = open_workload(f"{name}={path}")
    assert workload.prompts == ("How many?",)
    assert workload.style == FROM_FILE[name]
    assert workload.name == ("mine" if name == "own" else name)
    assert workload.source == "mine.jsonl"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("chess", "must be one of code, .*own=PATH, got 'chess'"),
        ("humaneval", "write humaneval=PATH, or use a bundled workload"),
        ("code=a.jsonl", "Only humaneval, .* got 'code=a.jsonl'"),
        ("own=no such file", "readable UTF-8 file"),
    ],
)
def test_workloads_that_cannot_be_had_are_refused(name, complaint):
    with pytest.raises(RequestError, match=complaint):
        open_workload(name)


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('"fine"\n{"prompt": \n')
    with pytest.raises(RequestError, match=r"own\.jsonl, line 2"):
        open_workload(f"own={path}")


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("plain", "He oo"),
        ("question", "Question: He oo\nAnswer:"),
        ("docstring", '"""\nHe oo\n"""\n'),
    ],
)
def test_encode_prompt_puts_the_style_around_it(style, text):
    model = tokenized()
    workload = Workload(name="one", prompts=("He oo",), style=style)
    assert encode_prompt(model, workload, "He oo") == tuple(model.tokenizer.encode(text))


def test_random_prompts_are_ordinary_tokens_and_always_the_same():
    model = tokenized()
    workload = open_workload("random")
    one, other = (encode_prompt(model, workload, prompt) for prompt in workload.prompts[:2])
    assert one == encode_prompt(model, workload, workload.prompts[0]) != other
    ordinary = set(model.vocabulary.values()) - model.tokenizer.special_ids()
    assert set(one + other) <= ordinary
    assert len(np.unique(one)) > 10


def test_chat_prompts_need_a_template():
    with pytest.raises(RequestError, match="chat template"):
        encode_prompt(tokenized(), open_workload("chat"), "Hello")


def test_random_prompts_are_refused_where_speed_depends_on_acceptance():
    draft = tiny("llama").model
    allowed = ["ar", "wide:k=4", "draft:k=2,accept=0.7", "ssd:k=2,f=2,accept=0.5"]
    methods = [parse_method(name, draft, draft) for name in allowed]
    refuse_guesses(open_workload("random"), methods)
    for name in ("draft:k=2", "ngram", "combined:k=2", "ssd:k=2"):
        guessing = parse_method(name, draft, draft)
        refuse_guesses(open_workload("code"), [guessing])
        with pytest.raises(RequestError, match=f"accept=RATE, got {name}"):
            refuse_guesses(open_workload("random"), [*methods, guessing])


def test_parse_method_reads_verification():
    draft = tiny("llama").model
    for name in ("draft:verify=rejection", "ssd:verify=rejection"):
        assert parse_method(name, draft, draft).speculation.verification == "rejection"
    with pytest.raises(RequestError, match="'chance'"):
        parse_method("draft:verify=chance", draft, draft)
    with pytest.raises(RequestError, match="add f"):
        parse_method("ssd:k=2,miss=1-1-1", draft, draft)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"batches": (1, 0)}, "--batch must be at least 1, got 0"),
        ({"batches": (8,)}, r"must fill the largest batch \(8\), got 4"),
        ({"idle_layers": (0, -1)}, "--idle-layers must be 0 or more, got -1"),
        ({"workloads": ({"name": "a"}, {"name": "a"})}, "got a twice"),
    ],
)
def test_plans_that_cannot_be_measured_are_refused(changes, complaint):
    with pytest.raises(RequestError, match=complaint):
        plan(**changes)


def test_num_passes_counts_batches_of_all_cells():
    assert plan().num_passes == 2 * (4 + 2)


def test_open_record_goes_on_with_its_own_plan_only(tmp_path):
    path = tmp_path / "run.json"
    begun = open_record(plan(), path)
    assert (begun["schema"], begun["complete"], begun["cells"]) == (SCHEMA, False, [])
    begun["cells"].append("measured")
    write_record(begun, path)
    again = open_record(plan(), path)
    assert again["cells"] == ["measured"]
    assert len(again["sittings"]) == 2
    with pytest.raises(RequestError, match=r"with max_tokens 8, which cannot go on with 9"):
        open_record(plan(max_tokens=9), path)
    begun["environment"]["commit"] = "another"
    write_record(begun, path)
    with pytest.raises(RequestError, match="with commit 'another'"):
        open_record(plan(), path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not"),
        (json.dumps({"schema": SCHEMA}), "of kind None"),
        (json.dumps({"schema": SCHEMA - 1, "kind": "run"}), f"schema {SCHEMA}, got {SCHEMA - 1}"),
    ],
)
def test_files_that_hold_something_else_are_refused(content, complaint, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=complaint):
        require_run(read_record(path), path)
    with pytest.raises(RequestError, match=complaint):
        open_record(plan(), path)


def test_fingerprint_tells_prompts_and_styles_apart():
    one = Workload(name="a", prompts=("x", "y"))
    assert fingerprint(one) == fingerprint(Workload(name="b", prompts=("x", "y")))
    assert fingerprint(one) != fingerprint(Workload(name="a", prompts=("xy",)))
    assert fingerprint(one) != fingerprint(Workload(name="a", prompts=("x", "y"), style="question"))
