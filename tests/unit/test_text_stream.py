import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from ssd_jax.errors import RequestError
from ssd_jax.text import TextDelta, TextStream, load_tokenizer
from ssd_jax.text.detokenizer import byte_alphabet

MANY_EXAMPLES = settings(max_examples=200, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token for each byte, a few longer ones and a special one."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    words = ["ab", "bca", "cab", "".join(letters[byte] for byte in "é".encode())]
    tokens = [*(letters[byte] for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    folder = tmp_path_factory.mktemp("stream")
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


ids_of_few_tokens = st.lists(
    st.sampled_from([97, 98, 99, 0xC3, 0xA9, 256, 257, 258, 259, 260]), max_size=20
)
stop_sets = st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3).map(tuple)


def reference(tokenizer, ids, stops):
    """Text, number of tokens and stop, found by decoding ever longer prefixes."""
    for count in range(1, len(ids) + 1):
        # A character still open at the end of this prefix is not text yet, unless it is the end.
        text = tokenizer.decode(ids[:count])
        if count < len(ids) and text.endswith("\ufffd"):
            text = text[:-1]
        ends = [
            (text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text
        ]
        if ends:
            _, start, stop = min(ends)
            return text[:start], count, stop
    return tokenizer.decode(ids), len(ids), None


@MANY_EXAMPLES
@given(ids=ids_of_few_tokens, stops=stop_sets, lengths=st.lists(st.integers(0, 4), max_size=12))
def test_any_split_gives_the_same_text_count_and_stop(tokenizer, ids, stops, lengths):
    stream = TextStream(tokenizer, stops=stops)
    deltas, start = [], 0
    for length in lengths:
        deltas.append(stream.push(ids[start : start + length]))
        start += length
    deltas += [stream.push(ids[start:]), stream.flush()]
    text, num_tokens, stop = reference(tokenizer, ids, stops)
    assert "".join(delta.text for delta in deltas) == text
    assert (deltas[-1].num_tokens, deltas[-1].stop) == (num_tokens, stop)
    assert deltas[-1].finished
    for delta in deltas[:-1]:
        assert delta.finished == (delta.stop is not None)


def test_tokens_behind_the_stop_do_not_count(tokenizer):
    stream = TextStream(tokenizer, stops=("bc",))
    a, b, c, ab = 97, 98, 99, 256
    assert stream.push([a, ab]) == TextDelta(text="aa", num_tokens=2, finished=False, stop=None)
    assert stream.push([c, a, b]) == TextDelta(text="", num_tokens=3, finished=True, stop="bc")
    assert stream.push([a]) == TextDelta(text="", num_tokens=3, finished=True, stop="bc")
    assert stream.flush() == TextDelta(text="", num_tokens=3, finished=True, stop="bc")


def test_flush_releases_what_was_held_and_ends_the_stream(tokenizer):
    stream = TextStream(tokenizer, stops=("abc",))
    assert stream.push([97, 98, 0xC3]).text == ""
    assert stream.flush() == TextDelta(text="ab\ufffd", num_tokens=3, finished=True, stop=None)
    assert stream.push([97]).text == ""


def test_a_stop_may_be_completed_by_the_flush(tokenizer):
    stream = TextStream(tokenizer, stops=("\ufffd",))
    assert stream.push([97, 0xC3]).stop is None
    assert stream.flush() == TextDelta(text="", num_tokens=2, finished=True, stop="\ufffd")


def test_special_tokens_count_but_give_no_text(tokenizer):
    end = tokenizer.token_to_id("<|end|>")
    skipping = TextStream(tokenizer, stops=("ab",)).push([97, end, 98])
    assert skipping == TextDelta(text="", num_tokens=3, finished=True, stop="ab")
    showing = TextStream(tokenizer, skip_special_tokens=False).push([97, end, 98])
    assert showing.text == "a<|end|>b"


def test_empty_stop_is_refused(tokenizer):
    with pytest.raises(RequestError, match="stop strings"):
        TextStream(tokenizer, stops=("",))
