import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_jax.errors import RequestError
from ssd_jax.text.prompt_file import read_prompts


@given(prompts=st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_prompts_of_plain_and_gzipped_files_in_both_layouts(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    objects = [{"prompt": prompt, "other": 1} for prompt in prompts]
    layouts = {
        "lines": "\n\n".join(map(json.dumps, objects)),
        "texts": "\n".join(map(json.dumps, prompts)),
        "list": json.dumps(objects, indent=2),
    }
    for name, text in layouts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert read_prompts(folder / name) == read_prompts(folder / f"{name}.gz") == tuple(prompts)


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ({"task_id": "HumanEval/0", "prompt": "def f(", "test": "x"}, "def f("),
        ({"question": "How many?", "answer": "2"}, "How many?"),
        ({"Body": "Two cats.", "Question": "How many?", "Answer": 2.0}, "Two cats. How many?"),
        ({"instruction": "Rewrite.", "instances": []}, "Rewrite."),
        ({"question_id": 1, "turns": ["First?", "Second?"]}, "First?"),
        ({"text": "Write a function.", "code": "x"}, "Write a function."),
        ({"class": "a", "data": "Write a letter."}, "Write a letter."),
    ],
)
def test_entries_of_common_evaluation_sets(tmp_path, entry, prompt):
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    assert read_prompts(tmp_path / "a.jsonl") == (prompt,)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '""', '{"answer": "a"}', '{"prompt": 1}', '{"prompt": ""}', '{"turns": []}'],
)
def test_file_and_line_of_a_bad_prompt_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(RequestError, match=r"bad\.jsonl, line 3"):
        read_prompts(path)


def test_the_entry_of_a_list_is_named(tmp_path):
    (tmp_path / "bad.json").write_text('["a", 3]')
    with pytest.raises(RequestError, match=r"bad\.json, entry 2"):
        read_prompts(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("none.json", b"[]"),
        ("latin.jsonl", b'"\xff"'),
        ("no.jsonl.gz", b"not gzip"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9]),
        ("absent.jsonl", None),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=name):
        read_prompts(tmp_path / name)
