import os
import termios

import pytest

from ssd_jax.cli.notes import note, terminal_width


@pytest.fixture
def on_terminal(monkeypatch):
    """Runs a function with a terminal of 20 columns behind stderr: its result, what is shown."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 20))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(function, *arguments):
        with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            result = function(*arguments)
            print(end=".", file=stream, flush=True)
            return result, os.read(ours, 4096).decode().removesuffix(".")

    yield run
    os.close(ours)


def test_a_note_is_broken_at_words_and_dim(on_terminal):
    _, shown = on_terminal(note, "the cat sat on the mat in the rain")
    assert shown == "\x1b[2mthe cat sat on the\r\nmat in the rain\x1b[0m\r\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_note_is_plain_where_that_is_wanted(on_terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert on_terminal(note, "the cat")[1] == "the cat\r\n"


def test_a_note_in_a_file_is_one_line(capsys):
    note("the cat sat on the mat " * 9)
    assert capsys.readouterr().err == "the cat sat on the mat " * 9 + "\n"


def test_the_width_is_that_of_the_terminal_even_if_stdout_is_none(on_terminal):
    assert on_terminal(terminal_width)[0] == 20
