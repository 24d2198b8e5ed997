"""Tokenizer files with odd values, and chat templates that mean harm: use or a sentence.

Seeded: a case is its number.
"""

import copy
import json
import math
import random
import shutil

import jinja2
import pytest
import tokenizers
from fuzz_cases import SLOW_COUNT, Raw, as_text, numbered
from tokenizers import decoders, models, pre_tokenizers, processors

from ssd_jax.errors import SsdJaxError
from ssd_jax.text import chat_template, load_tokenizer
from ssd_jax.text.tokenizer import Tokenizer

MAX_MESSAGE = 450
TEXTS = ("", "the cat", "<s>the</s>", "\u00e9\U0001f600 \n\t", "x" * 200)
MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


VALUES = (
    None, True, False, "", "a", "<s>", "</s>", "x" * 5000, "\x00\x1b[2J", "\udc80", math.nan,
    math.inf, Raw("1e400"), -1, 0, 1, 2, 0.5, 300, 2**31, 2**32, 2**63, 2**64, 10**399,
    Raw("9" * 5000), [], [1], ["x"], [None], [[[]]], {}, {"a": 1}, {"content": "<s>"},
    {"content": "new", "special": True}, {"content": "<s>", "special": "yes"}, {"content": 3},
    ["<s>", "extra"], {"type": "BPE"}, {"type": "Sequence", "decoders": []}, {"type": "ByteLevel"},
    {"type": "Unheard"}, {"0": "<s>"}, {"7": {"content": "late"}}, Raw("[" * 90 + "]" * 90),
    Raw("[" * 5000 + "]" * 5000), Raw('{"a":' * 5000 + "1" + "}" * 5000),
)  # fmt: skip
FIELDS = {
    "tokenizer_config.json": (
        "bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token",
        "chat_template", "added_tokens_decoder", "additional_special_tokens",
        "extra_special_tokens", "model_max_length", "tokenizer_class", "unheard_of",
    ),
    "special_tokens_map.json": ("bos_token", "eos_token", "pad_token", "additional_special_tokens",
                                "extra_special_tokens", "unheard_of"),
    "added_tokens.json": ("<s>", "</s>", "new", "", "x" * 5000),
    "generation_config.json": ("bos_token_id", "eos_token_id", "pad_token_id", "temperature"),
    "config.json": ("bos_token_id", "eos_token_id", "vocab_size"),
    "chat_template.json": ("chat_template",),
}  # fmt: skip


def plain_files():
    """A small tokenizer of bytes and a few merges, with all files that go with one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1}
    for token in (*alphabet, "th", "the"):
        vocabulary[token] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return {
        "tokenizer.json": json.loads(backend.to_str()),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": True},
            "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
            "chat_template": TEMPLATE,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
        "added_tokens.json": {},
        "generation_config.json": {"eos_token_id": [1]},
        "config.json": {"vocab_size": len(vocabulary), "bos_token_id": 0},
    }


@pytest.fixture(scope="module")
def plain():
    return plain_files()


def damage(number, plain):
    """The files of one case as texts, and which one was changed."""
    chance = random.Random(number)
    files = copy.deepcopy(plain)
    if chance.random() < 0.45:
        name = "tokenizer.json"
        for _ in range(chance.choice((1, 1, 2))):
            change_somewhere(chance, files[name])
    else:
        name = chance.choice(tuple(FIELDS))
        content = files.setdefault(name, {})
        for _ in range(chance.choice((1, 1, 2))):
            content[chance.choice(FIELDS[name])] = chance.choice(VALUES)
    texts = {file: as_text(content) for file, content in files.items()}
    if chance.random() < 0.08:
        text = texts[name]
        cut = chance.randrange(max(1, len(text)))
        texts[name] = chance.choice(
            ("", text[:cut], "[]", "null", "[" * 10_000, text[:cut] + "\udcff" + text[cut:],
             text[:cut] + "\x00" + text[cut:], "\ufeff" + text, text.replace(":", "="))
        )  # fmt: skip
    return texts, name


def change_somewhere(chance, tree):
    """Put an odd value, or nothing, in place of one somewhere in a tree, mostly near the top."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            if isinstance(tree, dict):
                tree["new"] = copy.deepcopy(chance.choice(VALUES))
            return
        key = chance.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and chance.random() < 0.75:
            tree = tree[key]
            continue
        if chance.random() < 0.15:
            del tree[key]
        else:
            tree[key] = copy.deepcopy(chance.choice(VALUES))
        return


def verdict(number, folder, plain):
    """What is wrong with how one case came out, None if nothing is."""
    texts, name = damage(number, plain)
    for file, text in texts.items():
        (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        tokenizer = load_tokenizer(folder)
        wrong = about_use(tokenizer)
    except SsdJaxError as error:
        return about_message(str(error), name)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{name}: {type(error).__name__}: {str(error)[:300]}"
    return wrong and f"{name}: {wrong}"


def about_message(message, name):
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message[:150]}"
    if not message.isprintable():
        return f"a message with control characters: {message!r}"
    if name.removeprefix("special_").removesuffix(".json").split("_")[0] not in message:
        return f"a message that does not name {name}: {message}"
    return None


def about_use(tokenizer: Tokenizer):
    ids = (*tokenizer.eos_ids, *(() if tokenizer.bos_id is None else (tokenizer.bos_id,)))
    if not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        return f"the special ids {ids} were accepted"
    vocabulary = tokenizer.vocabulary()
    if not all(isinstance(token, str) and 0 <= one < 2**32 for token, one in vocabulary.items()):
        return "a vocabulary with odd ids was accepted"
    for text in TEXTS:
        own = tokenizer.encode(text, add_special_tokens=False)
        theirs = tokenizer.backend.encode(text, add_special_tokens=False).ids
        if own != theirs:
            return f"{text!r} became {own}, not {theirs}"
        tokenizer.decode(tokenizer.encode(text))
    for name, token in tokenizer.special_tokens.items():
        if not isinstance(name, str) or not isinstance(token, str | list):
            return f"the special token {name!r}: {token!r} was accepted"
    if tokenizer.chat_template is not None and not isinstance(tokenizer.chat_template, str):
        return f"the chat template {tokenizer.chat_template!r} was accepted"
    tokenizer.special_ids(), tokenizer.special_tokens_by_text(), tokenizer.decoder_kinds()
    return None


def run(numbers, tmp_path, plain):
    wrong = []
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        found = verdict(number, folder, plain)
        if found is not None:
            wrong.append(f"input {number}: {found}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong[:60])


def test_odd_values_are_used_or_refused(tmp_path, plain):
    run(numbered(400), tmp_path, plain)


@pytest.mark.slow
def test_ten_thousand_odd_values_are_used_or_refused(tmp_path, plain):
    run(numbered(SLOW_COUNT), tmp_path, plain)


def test_the_plain_files_are_fine(tmp_path, plain):
    for file, content in plain.items():
        (tmp_path / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert about_use(tokenizer) is None


def test_dropout_is_for_training(tmp_path, plain):
    """With it, the same text would be other tokens each time."""
    files = copy.deepcopy(plain)
    files["tokenizer.json"]["model"]["dropout"] = 0.5
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode("the the the")) for _ in range(20)}) == 1


def test_a_special_token_that_does_not_exist_is_found_at_once(tmp_path, plain):
    files = copy.deepcopy(plain)
    files["tokenizer.json"]["post_processor"]["special_tokens"] = {}
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(SsdJaxError, match=r"Expected a tokenizer in .*tokenizer.json"):
        load_tokenizer(tmp_path)


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ messages|tojson(indent='x' * 10**8) }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}"
    "{{ n.x|length }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ((('a' * 40) ~ '!')|replace('a', 'a' * 9999))|replace('a', 'a' * 9999)|length }}",
)
HUGE = (
    "{{ 'x' * 10**9 }}",
    "{{ 'x'.center(10**9) }}",
    "{{ messages|batch(10**9, 'x')|list|string|length }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'x'|indent(10**9, true) }}",
    "{{ [1] * 10**9 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ lipsum(n=10**6) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
)
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ self._TemplateReference__context }}",
    "{{ '%s'|format(raise_exception.__globals__) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{{ messages|map(attribute='__class__')|list }}",
)
BROKEN = (
    "{{", "{% for %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{% endif %}", "\x00{{ 1",
    "{{ (" * 500, "{% if 1 %}" * 3000, "{{ raise_exception('\x1b[2J' * 9999) }}", "{{ '\\ud800' }}",
    "{{ x| }}",
)  # fmt: skip


def render(template):
    try:
        return chat_template.render_chat(template, MESSAGES, special_tokens={})
    except SsdJaxError as error:
        message = str(error)
        assert len(message) < MAX_MESSAGE, message[:200]
        assert "template" in message
        return None


def test_a_template_ends_within_its_time(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1)
    assert render(ENDLESS[0]) is None


@pytest.mark.parametrize("template", [HUGE[1], ESCAPES[0], BROKEN[4]])
def test_a_template_that_means_harm_is_refused(template):
    assert render(template) is None


@pytest.mark.slow
@pytest.mark.parametrize("template", ENDLESS + HUGE + ESCAPES + BROKEN, ids=lambda text: text[:40])
def test_every_template_that_means_harm_is_refused(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 5)
    text = render(template)
    assert text is None or (len(text) < 10**6 and "root:" not in text and "<class" not in text)


CHATML = (
    "{%- for message in messages %}{%- if loop.first and message['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message['content']|trim + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
FILTERS = tuple(sorted(jinja2.defaults.DEFAULT_FILTERS))
SUBJECTS = ("messages", "'x'", "messages[0]", "messages[0].content", "none", "10**400", "range(9)",
            "{'a': [1]}", "bos_token", "loop", "cycler", "namespace", "1e308 * 10")  # fmt: skip
ARGUMENTS = ("", "10**9", "-1", "'x' * 9999", "none", "messages", "true, 10**9", "1, 2, 3, 4, 5",
             "attribute='__class__'", "'__class__'", "**{'a': 1}", "*messages", "0")  # fmt: skip


def odd_template(number):
    """A template of one case: a real one with a piece moved, or filters with odd arguments."""
    chance = random.Random(number)
    if chance.random() < 0.4:
        text = chance.choice((TEMPLATE, CHATML))
        for _ in range(chance.choice((1, 2, 3))):
            start, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
            piece = text[start : min(end, start + 30)]
            rest = text[:start] + text[start + len(piece) :]
            at = chance.randrange(len(rest) + 1)
            text = chance.choice((rest, rest[:at] + piece + rest[at:], text[:at] + piece * 50))
        return text
    filters = "".join(
        f"|{chance.choice(FILTERS)}({chance.choice(ARGUMENTS)})"
        for _ in range(chance.choice((1, 2)))
    )
    return "{{ " + chance.choice(SUBJECTS) + filters + " }}"


def render_odd(numbers, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 4)
    for number in numbers:
        template = odd_template(number)
        try:
            text = render(template)
        except Exception as error:
            raise AssertionError(f"input {number}: {template}") from error
        assert text is None or len(text) <= chat_template.MAX_CHARS


def test_odd_templates_are_rendered_or_refused(monkeypatch):
    render_odd(numbered(12), monkeypatch)


@pytest.mark.slow
def test_a_thousand_odd_templates_are_rendered_or_refused(monkeypatch):
    render_odd(numbered(1000), monkeypatch)
