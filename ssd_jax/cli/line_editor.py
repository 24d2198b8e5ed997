"""What the user says: typed in an editor on a terminal, else read line by line."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ssd_jax.cli.notes import note

_QUOTES = '"""'
_PROMPT, _CONTINUATION = "> ", "  "


def read_turns(lines: Iterable[str]) -> Iterator[str]:
    """The turns in a pipe: its lines, blank ones left out, those joined that go on."""
    text = ""
    for line in lines:
        text += line.rstrip("\r\n")
        longer = continued(text)
        if longer is not None:
            text = longer
            continue
        if turn := finished(text):
            yield turn
        text = ""
    if turn := finished(text):
        yield turn


def type_turns(session: Any) -> Iterator[str]:  # noqa: ANN401 (see `make_session`)
    """The turns that are typed, blank ones left out, until Ctrl-D; Ctrl-C empties the line."""
    while True:
        try:
            turn = finished(session.prompt())
        except EOFError:
            return
        except KeyboardInterrupt:
            note("Ctrl-D or /exit leaves")
            continue
        if turn:
            yield turn


def continued(text: str) -> str | None:
    r"""The text to go on with, if Enter at its end does not end the turn, else None.

    That is so after a `\`, which goes away, and between two `\"\"\"`.
    """
    if text.lstrip().startswith(_QUOTES) and text.count(_QUOTES) % 2:
        return f"{text}\n"
    return f"{text[:-1]}\n" if text.endswith("\\") else None


def finished(text: str) -> str:
    r"""The turn: the text without the `\"\"\"` around it and without blanks at its ends."""
    text = text.strip()
    if text.startswith(_QUOTES) and text.count(_QUOTES) <= 2:
        text = text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
        return text if text.strip() else ""
    return text


def make_session(**options: Any) -> Any:  # noqa: ANN401 (prompt_toolkit is imported only here)
    """An editor with history: pasted lines are one turn, Alt-Enter begins a new line.

    `options` go to prompt_toolkit's PromptSession. It draws on stderr if stdout is no terminal.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        at_end = buffer.cursor_position == len(buffer.text)
        longer = continued(buffer.text) if at_end else None
        if longer is None:
            buffer.validate_and_handle()
        else:
            buffer.text = longer
            buffer.cursor_position = len(longer)

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    options = {"output": create_output(always_prefer_tty=True), **options}
    return PromptSession(
        _PROMPT,
        multiline=True,
        prompt_continuation=_CONTINUATION,
        key_bindings=keys,
        enable_suspend=True,
        **options,
    )


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """What is typed outside the editor is not shown among the output; the next prompt shows it."""
    if not sys.stdin.isatty():
        yield
        return
    import termios  # not on every platform

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
