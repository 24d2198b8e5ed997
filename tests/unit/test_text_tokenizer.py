import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from ssd_jax.errors import CheckpointError, RequestError
from ssd_jax.text import load_tokenizer

BOS, EOS, TURN = 256, 257, 258


def write(folder, *, adds_bos=False, **files):
    """A byte tokenizer with three special tokens, and JSON files given as name=contents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<turn>"])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(folder / "tokenizer.json"))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents), encoding="utf-8")
    return folder


def test_bare_folder(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    assert tokenizer.vocab_size == 259 == len(tokenizer.vocabulary())
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, (), None)
    assert tokenizer.token_to_id("<turn>") == TURN == tokenizer.vocabulary()["<turn>"]
    assert tokenizer.id_to_token(TURN) == "<turn>"
    assert tokenizer.token_to_id("nothing") is None
    assert tokenizer.id_to_token(5000) is None


def test_neither_truncates_nor_pads_and_reads_back(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    assert len(tokenizer.encode("a")) == 1
    text = "longer than four: 日本語 👩‍👩‍👧"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("a</s>b")
    assert ids[1] == EOS
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a</s>b"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("add_bos_token", [False, True, None])
@pytest.mark.parametrize("text", ["", "a", "<s>a", "<s><s>a"])
def test_bos_is_added_once_where_asked_for(tmp_path, adds_bos, add_bos_token, text):
    config = {"bos_token": {"content": "<s>"}, "add_bos_token": add_bos_token}
    tokenizer = load_tokenizer(write(tmp_path, adds_bos=adds_bos, tokenizer_config=config))
    assert tokenizer.bos_id == BOS
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert plain.count(BOS) == text.count("<s>")
    wants_bos = (adds_bos or add_bos_token is True) and plain[:1] != [BOS]
    assert tokenizer.encode(text) == ([BOS] if wants_bos else []) + plain


def test_a_text_may_begin_with_two_bos_if_nobody_adds_one(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, config={"bos_token_id": BOS}))
    assert tokenizer.encode("<s><s>")[:2] == [BOS, BOS]


@pytest.mark.parametrize(
    ("files", "bos_id", "eos_ids"),
    [
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, BOS, (EOS,)),
        ({"special_tokens_map": {"eos_token": {"content": "<turn>"}}}, None, (TURN,)),
        ({"config": {"bos_token_id": BOS, "eos_token_id": EOS}}, BOS, (EOS,)),
        (
            {
                "generation_config": {"eos_token_id": [TURN, EOS], "bos_token_id": 7},
                "config": {"eos_token_id": EOS, "bos_token_id": 8},
                "tokenizer_config": {"eos_token": {"content": "<s>"}, "bos_token": None},
            },
            7,
            (TURN, EOS, BOS),
        ),
        (
            {
                "tokenizer_config": {"eos_token": "</s>"},
                "special_tokens_map": {"eos_token": "<turn>"},
                "generation_config": {"eos_token_id": 0},
            },
            None,
            (0, EOS),
        ),
    ],
)
def test_special_ids_are_the_union_of_the_files(tmp_path, files, bos_id, eos_ids):
    tokenizer = load_tokenizer(write(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos_id, eos_ids)


def test_chat_template_file_wins_over_the_settings(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "d"
    write(tmp_path, chat_template={"chat_template": "from json"})
    assert load_tokenizer(tmp_path).chat_template == "from json"
    (tmp_path / "chat_template.jinja").write_text("größe {{ bos_token }}", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "größe {{ bos_token }}"


def test_encode_chat_adds_no_specials_of_its_own(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": template + "{% if add_generation_prompt %}<turn>{% endif %}",
    }
    tokenizer = load_tokenizer(write(tmp_path, adds_bos=True, tokenizer_config=config))
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.encode_chat(messages) == [BOS, letter, EOS, TURN]
    assert tokenizer.encode_chat(messages, add_generation_prompt=False) == [BOS, letter, EOS]


def test_chat_without_a_template_is_refused(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_broken_unicode_is_refused(tmp_path):
    with pytest.raises(RequestError, match="position 1"):
        load_tokenizer(write(tmp_path)).encode("a\udcff")


def test_special_ids_leave_out_ordinary_added_tokens(tmp_path):
    write(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([AddedToken("ordinary")])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).special_ids() == {BOS, EOS, TURN}


@pytest.mark.parametrize("contents", [None, b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe"])
def test_missing_or_damaged_tokenizer_is_named(tmp_path, contents):
    if contents is not None:
        (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"]
)
@pytest.mark.parametrize(
    "contents", [b"{", b"[1]", b"\xff", b"[" * 10**5, b'{"a":' * 10**5, b'{"x": ' + b"9" * 5000]
)
def test_damaged_settings_are_named(tmp_path, name, contents):
    write(tmp_path)
    (tmp_path / f"{name}.json").write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"{name}\.json") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": {"eos_token": "<nowhere>"}}, "<nowhere>"),
        ({"tokenizer_config": {"bos_token": 5}}, "bos_token"),
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template"),
        ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id"),
        ({"config": {"eos_token_id": [1, -2]}}, "eos_token_id"),
        ({"config": {"bos_token_id": True}}, "bos_token_id"),
        ({"config": {"eos_token_id": 2**31}}, r"config\.json.*eos_token_id|eos_token_id.*config"),
        ({"config": {"eos_token_id": 10**400}}, r"eos_token_id in .*config\.json"),
        ({"config": {"eos_token_id": [1, 300], "vocab_size": 300}}, "below 300"),
        ({"config": {"vocab_size": 300}, "generation_config": {"eos_token_id": 300}}, "generation"),
    ],
)
def test_contradictory_settings_are_refused(tmp_path, files, words):
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(write(tmp_path, **files))


def entry(content, **flags):
    names = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": content} | dict.fromkeys(names, False) | flags


def test_tokens_that_stand_beside_tokenizer_json_are_tokens(tmp_path):
    decoder = {"260": entry("<end>", special=True), "259": entry("<think>")}
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "extra_special_tokens": {"image_token": "<img>"},
        "pad_token": "<pad>",
        "eos_token": "<end>",
    }
    added = {"<legacy>": 261, "<think>": 259}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=config, added_tokens=added))
    names = ["<think>", "<end>", "<legacy>", "<pad>", "<a>", "<b>", "<img>"]
    assert [tokenizer.token_to_id(name) for name in names] == list(range(259, 266))
    assert tokenizer.encode("<think><end><legacy><img>") == [259, 260, 261, 265]
    assert tokenizer.special_ids() == {BOS, EOS, TURN, 260, 262, 263, 264, 265}
    assert tokenizer.decode([259, 260, 261, 265]) == "<think><legacy>"
    assert tokenizer.eos_ids == (260,)
    assert dict(tokenizer.special_tokens) == {
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<a>", "<b>"],
        "image_token": "<img>",
    }


def test_flags_beside_tokenizer_json_count(tmp_path):
    decoder = {str(TURN): entry("<turn>", lstrip=True), str(EOS): entry("</s>", special=True)}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config={"added_tokens_decoder": decoder}))
    assert tokenizer.special_ids() == {BOS, EOS}
    (letter,) = tokenizer.encode("a")
    assert tokenizer.encode("a  <turn>") == [letter, TURN]
    assert tokenizer.decode([letter, TURN, EOS]) == "a<turn>"


def test_a_named_special_token_of_the_vocabulary_is_special(tmp_path):
    write(tmp_path, tokenizer_config={"unk_token": "a"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_to_id("a") in tokenizer.special_ids()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"300": entry("<far>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"259": entry("<turn>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"259": entry("<x>", special="yes")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": entry("<x>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {"259": "\ud800"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: entry("<x>")}}},
        {"tokenizer_config": {"added_tokens_decoder": ["<x>"]}},
        {"added_tokens": {"<x>": 300}},
        {"added_tokens": {"<x>": 259.0}},
    ],
)
def test_added_tokens_that_cannot_be_are_refused_with_their_file(tmp_path, files):
    with pytest.raises(CheckpointError, match=rf"{next(iter(files))}\.json") as caught:
        load_tokenizer(write(tmp_path, **files))
    assert len(str(caught.value)) < 600


def test_the_chat_template_sees_all_special_tokens(tmp_path):
    config = {
        "chat_template": "{{ bos_token }}{{ pad_token }}{{ additional_special_tokens | join }}",
        "additional_special_tokens": ["<turn>"],
        "pad_token": "</s>",
    }
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=config))
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [EOS, TURN]
