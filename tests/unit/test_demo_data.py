import json

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.train_demo import data


def documents(texts):
    return [data.Document(text=text, source="PEPs") for text in texts]


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh "), 5)) for _ in range(400)]
    code = "def f(x):\n    if x:\n        return x\n" * 50
    return data.train_tokenizer(iter([" ".join(words), code]), 400)


@settings(deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in data.SPECIALS):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_specials_first_and_prepends_bos(tokenizer):
    assert [tokenizer.token_to_id(token) for token in data.SPECIALS] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.encode("abc").ids[0] == 0


def test_tokenizer_splits_digits_and_joins_indentation(tokenizer):
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("\n        a 12345")]
    assert pieces == ["Ċ", "Ġ" * 7, "Ġa", "Ġ", "123", "45"]


def test_encode_documents_puts_end_of_text_before_each(tokenizer):
    tokens = data.encode_documents(tokenizer, documents(["ab", "", "cd"]), lambda done: None)
    assert tokens.dtype == np.uint16
    assert np.sum(tokens == data.END_OF_TEXT_ID) == 3
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == (
        "<|endoftext|>ab<|endoftext|><|endoftext|>cd"
    )


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (
            "### Instruction:\nWhy?\n\n### Response:\nSo.\n",
            [("user", "Why?"), ("assistant", "So.")],
        ),
        ("User: a\nAssistant: b\n\nUser: c\n", [("user", "a"), ("assistant", "b")]),
        ("User: a\nUser: b\nAssistant: c", [("user", "a\n\nb"), ("assistant", "c")]),
    ],
)
def test_rendered_turns_equal_the_chat_template(text, turns):
    def fail(message):
        raise ValueError(message)

    template = jinja2.Environment().from_string(data.CHAT_TEMPLATE)
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = template.render(messages=messages, bos_token="", raise_exception=fail)
    parsed = data.parse_turns(text)
    assert parsed is not None
    assert data.render_turns(parsed) == expected
    with pytest.raises(ValueError, match="tool"):
        template.render(messages=[{"role": "tool", "content": ""}], raise_exception=fail)


def test_chat_template_puts_system_into_first_user_turn():
    template = jinja2.Environment().from_string(data.CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = template.render(messages=messages, bos_token="<|endoftext|>", add_generation_prompt=True)
    assert text == "<|endoftext|><|user|>\nS\n\nU<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("text", ["plain", "Assistant: a\nUser: b\nAssistant: c", "User: a"])
def test_parse_turns_refuses_text_without_a_user_led_exchange(text):
    assert data.parse_turns(text) is None


def test_split_documents_is_disjoint_complete_and_order_free():
    docs = documents([f"{i} " * 1000 for i in range(400)])
    split = data.split_documents(docs + docs[:10])
    again = data.split_documents(docs[::-1])
    assert split == again
    train, heldout = ({doc.text for doc in split[name]} for name in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == {doc.text for doc in docs}
    assert len(split["train"]) + len(split["heldout"]) == len(docs)
    assert sum(doc.num_bytes for doc in split["heldout"]) >= data.HELDOUT_MIN_BYTES


def test_read_stdlib_skips_what_it_should_and_caps_tests(tmp_path):
    files = {"a.py": "x = 1\n" * 100, "site-packages/b.py": "b", "_sysconfigdata_x.py": "c"}
    files |= {f"test/t{i}.py": f"y = {i}\n" * 20 for i in range(10)}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    texts = [doc.text for doc in data.read_stdlib(tmp_path)]
    tests = [text for text in texts if text.startswith("y")]
    assert [text for text in texts if not text.startswith("y")] == [files["a.py"]]
    assert 0 < sum(map(len, tests)) <= data.TEST_SHARE * sum(map(len, texts))


@settings(deadline=None)
@given(step=st.integers(0, 2**31), seed=st.integers(0, 2**31), seq_len=st.integers(1, 49))
def test_sample_batch_is_pure_and_takes_windows_of_weighted_domains(step, seed, seq_len):
    arrays = {
        "a": np.arange(50, dtype=np.uint16),
        "b": np.arange(1000, 1100, dtype=np.uint16),
        "c": np.arange(5000, 5002, dtype=np.uint16),
    }
    size = {"step": step, "seed": seed, "batch_size": 4, "seq_len": seq_len}
    batch = data.sample_batch(arrays, {"a": 1.0, "b": 3.0, "c": 0.0}, **size)
    assert batch.shape == (4, seq_len + 1)
    assert batch.dtype == np.int32
    assert (np.diff(batch, axis=1) == 1).all()
    assert batch.max() < 1100
    again = data.sample_batch(arrays, {"b": 3.0, "a": 1.0}, **size)
    np.testing.assert_array_equal(batch, again)


@pytest.mark.parametrize(
    ("weights", "match"), [({"x": 1.0}, "weights"), ({"a": 0.0}, "weights"), ({"a": 1.0}, "tokens")]
)
def test_sample_batch_refuses_bad_mixtures(weights, match):
    arrays = {"a": np.zeros(5, np.uint16)}
    with pytest.raises(data.DataError, match=match):
        data.sample_batch(arrays, weights, step=0, seed=0, batch_size=1, seq_len=5)


def test_load_split_returns_what_was_written(tmp_path):
    with pytest.raises(data.DataError, match=r"meta\.json"):
        data.load_split(tmp_path, "train")
    data.write_atomically(tmp_path / "train_math.npy", np.arange(7, dtype=np.uint16))
    data.write_atomically(tmp_path / "meta.json", json.dumps({"domains": {"math": {}}}))
    arrays = data.load_split(tmp_path, "train")
    np.testing.assert_array_equal(arrays["math"], np.arange(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train_math.npy"]
