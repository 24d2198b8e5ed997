import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ssd_jax.cli.word_wrap import WordWrap

TEXTS = st.text(alphabet="ab `~\n\t.界、é\u0301👍\u200d", max_size=80)


def wrapped(text, width, cuts=()):
    wrap = WordWrap(lambda: width)
    starts, ends = [0, *sorted(cuts)], [*sorted(cuts), len(text)]
    pieces = [wrap.push(text[start:end]) for start, end in zip(starts, ends, strict=True)]
    return "".join(pieces) + wrap.flush()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat sat on", "the cat\nsat on"),
        ("the cats", "the cats"),
        ("the  cat  sat", "the  cat\nsat"),
        ("  indent me", "  indent\nme"),
        ("one\n\ntwo three", "one\n\ntwo\nthree"),
        ("abcdefghijklm no", "abcdefghijklm no"),  # the terminal breaks it: "no" is in its 2nd line
        ("a abcdefghijkl m", "a\nabcdefghijkl m"),
        ("界界界界界", "界界界界\n界"),
        ("ab界界界界", "ab界界界\n界"),
        ("界界界界、界", "界界界\n界、界"),
        ("abcdefg 👩\u200d👩\u200d👧", "abcdefg\n👩\u200d👩\u200d👧"),
        ("```python\nx = 1 + 2 + 3\n```\nand so on", "```python\nx = 1 + 2 + 3\n```\nand so\non"),
        ("```a``` b c", "```a```\nb c"),
        ("~~~\n``` a b c d e\n~~~\na b c d e", "~~~\n``` a b c d e\n~~~\na b c d\ne"),
        ("ends in space ", "ends in\nspace "),
        ("", ""),
    ],
)
def test_breaks_at_eight_columns(text, expected):
    assert wrapped(text, 8) == expected


@given(TEXTS, st.integers(1, 20), st.data())
def test_what_is_shown_does_not_depend_on_how_the_text_comes(text, width, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert wrapped(text, width, cuts) == wrapped(text, width)


@given(TEXTS, st.integers(1, 20))
def test_only_blanks_become_breaks(text, width):
    shown = wrapped(text, width)
    assert "".join(shown.split()) == "".join(text.split())
    assert shown.count("\n") >= text.count("\n")


@given(st.text(alphabet="ab 界", max_size=80), st.integers(1, 20))
def test_lines_fit_unless_a_word_does_not(text, width):
    for line in wrapped(text, width).split("\n"):
        longest = max([cell_len(word) for word in line.replace("界", " 界 ").split()], default=0)
        assert cell_len(line.rstrip()) <= width or longest > width or not line[0].strip()


def test_a_word_waits_until_it_is_whole():
    wrap = WordWrap(lambda: 8)
    assert [wrap.push(piece) for piece in ("the c", "at", " sa", "t.")] == ["the", "", " cat", ""]
    assert wrap.flush() == "\nsat."


def test_the_width_may_change_meanwhile():
    widths = iter([20, 20, 8, 8])
    wrap = WordWrap(lambda: next(widths))
    assert wrap.push("the cat sat on ") == "the cat\nsat on"
