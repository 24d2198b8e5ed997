"""Incremental detokenising against decoding all at once, for random ids in random pieces."""

import re

import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from ssd_jax.errors import CheckpointError
from ssd_jax.text import Detokenizer, load_tokenizer
from ssd_jax.text.detokenizer import byte_alphabet

MANY_EXAMPLES = settings(max_examples=150, derandomize=True, deadline=None, database=None)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1)",
    "Größe, naïve café, e\u0301 und Straße",
    "日本語のテキストと漢字 👩‍👩‍👧 👍🏽 emoji",
]
SPECIALS = ["<|begin|>", "<|end|>"]
SURROGATE_START = re.compile(rb"\xed[\xa0-\xbf]\Z")
texts = st.text() | st.lists(
    st.sampled_from(
        [*SENTENCES, *SPECIALS, "👨‍🚀", "🇩🇪", "n\u0303\u0323", "\ufffd", "  ", " ", "é"]
    )
).map("".join)
cuts = st.lists(st.integers(1, 5), min_size=1, max_size=20)


def add_tokens(backend):
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens([AddedToken("two words"), AddedToken("日本"), AddedToken("é")])


def byte_level(kind):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level = decoders.ByteLevel()
    backend.decoder = decoders.Sequence([byte_level]) if kind == "sequence" else byte_level
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


def pieces(prepend_scheme):
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], initial_alphabet=["▁"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


def byte_fallback(strip):
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcé日", "▁a", "<0xZZ>"]
    vocab = {token: index for index, token in enumerate(letters)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    return backend


def words():
    vocab = {"<unk>": 0, "The": 1, "fox": 2, "a": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


BACKENDS = {
    "byte_level": lambda: byte_level("plain"),
    "byte_level_in_sequence": lambda: byte_level("sequence"),
    "metaspace_first": lambda: pieces("first"),
    "metaspace_never": lambda: pieces("never"),
    "words_without_decoder": words,
    "byte_fallback": lambda: byte_fallback(False),
    "byte_fallback_strip": lambda: byte_fallback(True),
}


def load(backend, folder):
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request, tmp_path_factory):
    backend = BACKENDS[request.param]()
    add_tokens(backend)
    return load(backend, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    backend = byte_level("plain")
    add_tokens(backend)
    return load(backend, tmp_path_factory.mktemp("bytes"))


def cut(ids, lengths):
    """The ids in pieces of the given lengths, over and over, some of them empty."""
    start, turn = 0, 0
    while start < len(ids):
        length = lengths[turn % len(lengths)]
        yield ids[start : start + length]
        start, turn = start + length, turn + 1
    yield []


def check(tokenizer, ids, lengths, skip_special_tokens):
    """Every emitted text is a prefix of the final one, and all of them together are it."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    for _ in range(2):  # the second time after a flush, which starts a new sequence
        emitted = ""
        for part in cut(ids, lengths):
            emitted += detokenizer.push(part)
            assert whole.startswith(emitted)
        assert emitted + detokenizer.flush() == whole


@MANY_EXAMPLES
@given(text=texts, lengths=cuts, skip=st.booleans())
def test_encoded_texts(tokenizer, text, lengths, skip):
    check(tokenizer, tokenizer.encode(text), lengths, skip)


@MANY_EXAMPLES
@given(data=st.data(), lengths=cuts, skip=st.booleans())
def test_the_text_behind_a_prompt_completes_it(tokenizer, data, lengths, skip):
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30)
        | texts.map(tokenizer.encode)
    )
    split = data.draw(st.integers(0, len(ids)))
    prompt = tokenizer.decode(ids[:split], skip_special_tokens=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assume("\ufffd" not in prompt and whole.startswith(prompt))
    detokenizer = Detokenizer(tokenizer, prompt_ids=ids[:split], skip_special_tokens=skip)
    text = "".join(detokenizer.push(part) for part in cut(ids[split:], lengths))
    assert prompt + text + detokenizer.flush() == whole


def test_bytes_that_complete_a_character_of_the_prompt_lose_nothing(tmp_path):
    tokenizer = load(byte_fallback(True), tmp_path)
    ids = [tokenizer.token_to_id(token) for token in ("a", "<0xC3>", "<0xA9>", "b", "c")]
    detokenizer = Detokenizer(tokenizer, prompt_ids=ids[:2])
    assert detokenizer.push(ids[2:]).endswith("bc")


@MANY_EXAMPLES
@given(data=st.data(), lengths=cuts, skip=st.booleans())
def test_random_ids(tokenizer, data, lengths, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    check(tokenizer, ids, lengths, skip)


@MANY_EXAMPLES
@given(content=st.binary(max_size=40), lengths=cuts)
@example(b"\xf0\x9f\x98\xf0\x9f\x98\x80", [1])
@example(b"\xed\xa0\x80\xc0\x80\xf4\x90\x80\x80\xff", [1])
@example("\ufffd\ufffd".encode() + b"\xef\xbf", [2])
def test_random_bytes(tokenizer, content, lengths):
    """Bytes through byte tokens, for the tokenizers that have them."""
    byte_of = {byte: letter for letter, byte in byte_alphabet().items()}
    ids = [
        tokenizer.token_to_id(f"<0x{byte:02X}>")
        if tokenizer.token_to_id("<0xFF>") is not None
        else tokenizer.token_to_id(byte_of[byte])
        for byte in content
    ]
    check(tokenizer, [i for i in ids if i is not None], lengths, True)


@MANY_EXAMPLES
@given(content=st.binary(max_size=30) | st.text(max_size=10).map(str.encode))
def test_holds_only_a_character_that_can_still_be_completed(byte_tokenizer, content):
    byte_of = {byte: letter for letter, byte in byte_alphabet().items()}
    detokenizer = Detokenizer(byte_tokenizer)
    emitted = ""
    for end in range(1, len(content) + 1):
        emitted += detokenizer.push([byte_tokenizer.token_to_id(byte_of[content[end - 1]])])
        held = content[:end].decode("utf-8", errors="replace").removeprefix(emitted)
        if SURROGATE_START.search(content[:end]):  # Python waits for all three bytes of these
            assert held == "\ufffd\ufffd"
        else:
            assert held == ("\ufffd" if can_be_completed(content[:end]) else "")


def can_be_completed(content):
    """Whether the content ends with the first bytes of a longer character, tried by completing."""
    for length in range(1, min(4, len(content) + 1)):
        for tail in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0\x80", b"\x90\x80\x80"):
            try:
                character = (content[-length:] + tail).decode("utf-8")
            except UnicodeDecodeError:
                continue
            if len(character) == 1:
                return True
    return False


def test_byte_alphabet_is_the_one_of_the_library():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in (bytes(range(128)).decode(), "\x80\xa0\xad\xff", "日本", "👍"):
        ((letters, _),) = encoded.pre_tokenize_str(text)
        assert bytes(alphabet[letter] for letter in letters) == text.encode()


class _CountingTokenizer:
    """A tokenizer that adds up how many ids it was asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.num_decoded = 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **options):
        self.num_decoded += len(ids)
        return self.tokenizer.decode(ids, **options)

    def id_to_token(self, token_id):
        self.num_decoded += 1
        return self.tokenizer.id_to_token(token_id)


@pytest.mark.parametrize("byte_token", [False, True])
def test_cost_per_token_is_bounded(tokenizer, byte_token):
    token = "<0xFF>" if byte_token else "a"
    token_id = tokenizer.token_to_id(token)
    counting = _CountingTokenizer(tokenizer)
    detokenizer = Detokenizer(counting)
    for _ in range(500):
        detokenizer.push([tokenizer.token_to_id("a") if token_id is None else token_id])
    detokenizer.flush()
    assert counting.num_decoded <= 4 * 500


def test_a_decoder_that_rewrites_its_text_is_refused(tmp_path):
    backend = pieces("first")
    backend.decoder = decoders.CTC()
    with pytest.raises(CheckpointError, match="CTC"):
        Detokenizer(load(backend, tmp_path))


def test_added_tokens_are_read_as_they_are_written(tmp_path):
    """Each letter of these stands for a byte in the byte-level alphabet, as in "Ġword"."""
    backend = byte_level("plain")
    backend.add_tokens([AddedToken(text) for text in ("<Größe>", "đem", "éé", "Ġzz")])
    backend.add_special_tokens(["<ende für alle>", "<schluß>"])
    tokenizer = load(backend, tmp_path)
    text = "日a <Größe> đeméé Ġzz<ende für alle> <schluß>b"
    ids = tokenizer.encode(text)
    assert tokenizer.token_to_id("<Größe>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    without = text.replace("<ende für alle>", "").replace("<schluß>", "")
    assert tokenizer.decode(ids) == without
    for skip, expected in ((False, text), (True, without)):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        pushed = "".join(detokenizer.push([token_id]) for token_id in ids)
        assert pushed + detokenizer.flush() == expected


def test_an_added_token_does_not_complete_the_character_before_it(tmp_path):
    backend = byte_level("plain")
    backend.add_tokens([AddedToken("©©")])
    tokenizer = load(backend, tmp_path)
    half = tokenizer.token_to_id("Ã")  # the byte C3; the sign could stand for A9
    ids = [half, tokenizer.token_to_id("©©")]
    assert tokenizer.decode(ids) == "\ufffd©©"
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids) + detokenizer.flush() == "\ufffd©©"
