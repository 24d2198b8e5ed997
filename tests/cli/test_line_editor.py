import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from ssd_jax.cli.line_editor import make_session, read_turns, type_turns

PASTE, END_OF_PASTE = "\x1b[200~", "\x1b[201~"
ALT_ENTER, CTRL_C, CTRL_D = "\x1b\r", "\x03", "\x04"


def typed(keys):
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        return list(type_turns(make_session(input=pipe, output=DummyOutput())))


@pytest.mark.parametrize(
    ("keys", "turns"),
    [
        ("a\rb\r", ["a", "b"]),
        ("  \r\ra \r", ["a"]),
        (
            f"{PASTE}def f():\n    return 1\n\nf(){END_OF_PASTE}\r",
            ["def f():\n    return 1\n\nf()"],
        ),
        (f"{PASTE}ls \\\r\n  -l{END_OF_PASTE} now\r", ["ls \\\n  -l now"]),
        (f"a{ALT_ENTER}b\r", ["a\nb"]),
        ("a\\\rb\\\rc\r", ["a\nb\nc"]),
        ('"""a\r\rb"""\r', ["a\n\nb"]),
        (f"a{CTRL_C}b\r", ["b"]),
        (f"{CTRL_C}b\r", ["b"]),
        ("世界 é\r", ["世界 é"]),
    ],
)
def test_typed_turns(keys, turns):
    assert typed(keys + CTRL_D) == turns


def test_ctrl_d_leaves_an_empty_line_only():
    assert typed(f"a{CTRL_D}b\r{CTRL_D}") == ["ab"]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("", []),
        ("a\n\n  \nb", ["a", "b"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\\\nb\n", ["a\nb"]),
        ('"""a\n\n b\n"""\nc\n', ["a\n\n b", "c"]),
        ('"""\na\n"""\n', ["a"]),
        ('"""a\nb', ["a\nb"]),
        ('"""a""" b """c"""\n', ['"""a""" b """c"""']),
        ('""""""\n', []),
    ],
)
def test_turns_of_a_pipe(text, turns):
    assert list(read_turns(text.splitlines(keepends=True))) == turns
