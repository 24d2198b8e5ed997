"""The commands of `ssd-jax chat`: each takes a conversation and says what comes next."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ssd_jax.cli.conversation import Conversation
from ssd_jax.errors import RequestError, shortened, shown
from ssd_jax.json_files import is_file
from ssd_jax.json_text import to_json
from ssd_jax.whole_file import write_whole


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a line of the user leads to.

    Attributes:
        conversation: how it is then.
        action: whether the model answers, goes on with its answer, nobody does, or the chat ends.
        note: what to tell the user, if anything.
    """

    conversation: Conversation
    action: Literal["answer", "continue", "wait", "leave"] = "wait"
    note: str = ""


def interpret(conversation: Conversation, line: str) -> Step:
    """What a message or a command leads to; `//` begins a message that begins with `/`.

    Raises:
        RequestError: an unknown command, or one that has nothing to work on.
        ConfigError: a file that cannot be written.
    """
    if line.startswith("/") and not line.startswith("//"):
        name, argument = (*line.split(maxsplit=1), "")[:2]
        if name not in _COMMANDS:
            raise RequestError(
                f"There is no command {shown(name)}: see /help, or begin the message with // if it "
                "is one."
            )
        takes, _, run = _COMMANDS[name]
        if argument and not takes:
            raise RequestError(f"{name} takes nothing behind it, got {shown(argument)}.")
        return run(conversation, argument)
    message = line[1:] if line.startswith("//") else line
    return Step(conversation=conversation.with_question(message), action="answer")


def _help(conversation: Conversation, _: str) -> Step:
    rows = [(f"{name} {takes}".strip(), text) for name, (takes, text, _) in _COMMANDS.items()]
    rows += [
        ("//...", "a message that begins with /"),
        ('\\ or """', 'a line that ends in \\ goes on in the next; """ begins and ends many lines'),
    ]
    width = max(len(name) for name, _ in rows)
    return Step(
        conversation=conversation, note="\n".join(f"{name:<{width}}  {text}" for name, text in rows)
    )


def _clear(conversation: Conversation, _: str) -> Step:
    return Step(conversation=Conversation(system=conversation.system), note="cleared")


def _retry(conversation: Conversation, _: str) -> Step:
    _require_answer(conversation)
    again = dataclasses.replace(conversation.without_last(), attempt=conversation.attempt + 1)
    return Step(conversation=again, action="answer")


def _undo(conversation: Conversation, _: str) -> Step:
    _require_answer(conversation)
    question = conversation.messages[-2]["content"]
    before = Conversation(system=conversation.system, messages=conversation.messages[:-2])
    return Step(
        conversation=before, note=f"taken back: {shortened(' '.join(question.split()), 60)}"
    )


def _continue(conversation: Conversation, _: str) -> Step:
    if not conversation.open_ids:
        raise RequestError("There is no answer that was cut: nothing to go on with.")
    return Step(conversation=conversation, action="continue")


def _save(conversation: Conversation, argument: str) -> Step:
    if not argument:
        raise RequestError("/save needs a FILE to write to.")
    path = Path(argument).expanduser()
    if os.path.exists(path) and not _is_saved(path):
        raise RequestError(
            f"{shown(argument)} is there and is no saved conversation: choose another name."
        )
    messages = conversation.for_template()
    write_whole(path, f"{to_json(messages, indent=2)}\n".encode())
    return Step(conversation=conversation, note=f"{len(messages)} messages saved to {argument}")


def _system(conversation: Conversation, argument: str) -> Step:
    changed = dataclasses.replace(conversation, system=argument or None, open_ids=())
    note = "system message set" if argument else "system message removed"
    return Step(conversation=changed, note=note)


def _leave(conversation: Conversation, _: str) -> Step:
    return Step(conversation=conversation, action="leave")


def _require_answer(conversation: Conversation) -> None:
    if len(conversation.messages) < 2:
        raise RequestError("There is no answer yet: say something first.")


def _is_saved(path: Path) -> bool:
    """Whether a file is something that `/save` may have written."""
    if not is_file(path):
        return False
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(messages, list) and all(
        isinstance(message, dict) and message.keys() == {"role", "content"} for message in messages
    )


# What each command takes, what it does in words, and the function.
_COMMANDS: dict[str, tuple[str, str, Callable[[Conversation, str], Step]]] = {
    "/help": ("", "this list", _help),
    "/clear": ("", "forget the conversation, not the system message", _clear),
    "/retry": ("", "answer the last message again, with another seed", _retry),
    "/undo": ("", "take back the last message and its answer", _undo),
    "/continue": ("", "go on with an answer that was cut", _continue),
    "/save": ("FILE", "write the conversation as JSON", _save),
    "/system": ("TEXT", "set the system message; without a text remove it", _system),
    "/exit": ("", "leave, as do /quit and Ctrl-D", _leave),
    "/quit": ("", "leave", _leave),
}
