import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.errors import RequestError
from ssd_jax.text import StopMatcher

FEW_EXAMPLES = settings(max_examples=200, derandomize=True, deadline=None, database=None)
stop_sets = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(tuple)
piece_lists = st.lists(st.text("abc", max_size=5), max_size=8)


def reference(text, stops):
    """The text before the first match, and the match, found one character at a time."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@FEW_EXAMPLES
@given(stop_sets, piece_lists)
def test_any_split_gives_the_text_before_the_first_match(stops, pieces):
    matcher = StopMatcher(stops)
    emitted = ""
    for index, piece in enumerate(pieces):
        text, stopped = matcher.push(piece)
        emitted += text
        seen = "".join(pieces[: index + 1])
        before, match = reference(seen, stops)
        assert stopped == (match is not None)
        assert matcher.matched == match
        # Exactly the text that may still turn into a stop string is held back.
        possible = [n for n in range(len(before) + 1) if begins_a_stop(before[n:], stops)]
        assert emitted == (before if stopped else before[: min(possible)])
    assert emitted + matcher.flush() == reference("".join(pieces), stops)[0]
    assert matcher.flush() == ""


def begins_a_stop(text, stops):
    return text == "" or any(stop != text and stop.startswith(text) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted", "matched"),
    [
        (("abcd", "c"), ["xab", "cd"], "xab", "c"),
        (("bcd", "cd"), ["ab", "c", "d"], "a", "bcd"),
        (("ab", "abc"), ["xabc"], "x", "ab"),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        (("\n\n",), ["x\n", "y\n", "\nz"], "x\ny", "\n\n"),
        (("終わり",), ["それで終", "わり。"], "それで", "終わり"),
    ],
)
def test_which_match_wins(stops, pieces, emitted, matched):
    matcher = StopMatcher(stops)
    assert "".join(matcher.push(piece)[0] for piece in pieces) == emitted
    assert matcher.matched == matched
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_without_stops_nothing_is_held():
    assert StopMatcher(()).push("text") == ("text", False)


@pytest.mark.parametrize("stops", [("",), ("a", ""), "abc", (1,)])
def test_empty_or_wrong_stops_are_refused(stops):
    with pytest.raises(RequestError, match="stop strings"):
        StopMatcher(stops)
