import contextlib
import json

import pytest

from ssd_jax.cli.chat_commands import interpret
from ssd_jax.cli.conversation import Conversation
from ssd_jax.errors import ConfigError, RequestError

EMPTY = Conversation(system="be kind")
ONE = EMPTY.with_question("a").with_answer("b")
CUT = EMPTY.with_question("a").with_answer("b", open_ids=(1, 2, 3))


def contents(conversation):
    return [message["content"] for message in conversation.for_template()]


@pytest.mark.parametrize(
    ("line", "message"), [("a /b", "a /b"), ("//usr", "/usr"), ("///", "//"), ("a\nb", "a\nb")]
)
def test_what_is_no_command_is_a_message(line, message):
    step = interpret(ONE, line)
    assert step.action == "answer"
    assert contents(step.conversation) == ["be kind", "a", "b", message]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("/reset", "There is no command '/reset': see /help"),
        ("/", "There is no command '/'"),
        ("/usr/bin is a folder", "'/usr/bin'"),
        ("/" + "x" * 5000, "There is no command"),
        ("/clear all", "/clear takes nothing behind it, got 'all'"),
        ("/retry", "no answer yet"),
        ("/undo", "no answer yet"),
        ("/continue", "no answer that was cut"),
        ("/save", "needs a FILE"),
    ],
)
def test_commands_that_cannot_be_done_are_refused(line, fragment):
    with pytest.raises(RequestError) as caught:
        interpret(EMPTY, line)
    assert fragment in str(caught.value)
    assert len(str(caught.value)) < 300


def test_help_names_every_command():
    note = interpret(EMPTY, "/help").note
    names = [line.split()[0] for line in note.splitlines()]
    for name in names:
        if name.startswith("/") and name != "//...":
            with contextlib.suppress(RequestError) if name == "/save" else contextlib.nullcontext():
                interpret(CUT, name)
    assert {"/clear", "/retry", "/undo", "/save", "/system", "/exit", "/quit"} <= set(names)


def test_clear_keeps_the_system_message_only():
    assert interpret(ONE, "/clear").conversation == EMPTY


def test_retry_asks_the_same_again_as_another_attempt():
    first = interpret(CUT, "/retry")
    assert (first.action, contents(first.conversation)) == ("answer", ["be kind", "a"])
    second = interpret(first.conversation.with_answer("c"), "/retry")
    assert (first.conversation.attempt, second.conversation.attempt) == (1, 2)
    assert interpret(second.conversation.with_answer("d"), "e").conversation.attempt == 0


def test_undo_goes_back_before_the_last_question():
    two = ONE.with_question("c").with_answer("d")
    step = interpret(two, "/undo")
    assert (step.action, contents(step.conversation)) == ("wait", contents(ONE))
    assert "c" in step.note


def test_continue_goes_on_where_the_answer_was_cut():
    step = interpret(CUT, "/continue")
    assert (step.action, step.conversation) == ("continue", CUT)
    longer = CUT.with_answer(" and more")
    assert contents(longer) == ["be kind", "a", "b and more"]
    with pytest.raises(RequestError, match="was cut"):
        interpret(longer, "/continue")


def test_the_system_message_is_set_and_removed():
    changed = interpret(ONE, "/system be brief\nand clear").conversation
    assert contents(changed) == ["be brief\nand clear", "a", "b"]
    assert contents(interpret(changed, "/system").conversation) == ["a", "b"]


def test_save_writes_the_messages_and_replaces_only_what_it_wrote(tmp_path):
    file = tmp_path / "talk, é.json"
    for conversation in (ONE, CUT.with_question("世界").with_answer("ok")):
        assert "saved" in interpret(conversation, f"/save {file}").note
        assert json.loads(file.read_text(encoding="utf-8")) == conversation.for_template()
    file.write_text('{"mine": 1}')
    with pytest.raises(RequestError, match="no saved conversation"):
        interpret(ONE, f"/save {file}")
    assert file.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["no/such/folder/x", "x" * 5000, "a\0b"])
def test_save_says_what_cannot_be_written(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        interpret(ONE, f"/save {tmp_path}/{name}")
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["/exit", "/quit"])
def test_leaving(line):
    assert interpret(ONE, line).action == "leave"
