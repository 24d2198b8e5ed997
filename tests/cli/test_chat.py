import json
from types import SimpleNamespace

import pytest

from ssd_jax.cli.chat import converse
from ssd_jax.errors import RequestError


@pytest.fixture
def chat(run, chat_checkpoint):
    return lambda stdin, *argv: run(
        "chat",
        "--model",
        chat_checkpoint,
        "--max-tokens",
        "4",
        *argv,
        stdin=stdin.encode("latin-1"),
    )


def said(text):
    return SimpleNamespace(text=text, completion=object())


def test_each_line_of_a_pipe_is_a_turn(chat):
    outcome = chat("the cat\n\nthe cat\n/reset\nthe cat\n", "--json", "--ignore-eos")
    first, second, third = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 0
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert (third["text"], third["usage"]) == (first["text"], first["usage"])


def test_the_system_message_is_part_of_the_prompt_even_after_a_reset(chat):
    counts = []
    for options in ((), ("--system", "dog")):
        outcome = chat("the cat\n/reset\nthe cat\n", "--json", *options)
        accounts = map(json.loads, outcome.out.splitlines())
        counts.append({account["usage"]["prompt_tokens"] for account in accounts})
    (plain,), (with_system,) = counts
    assert with_system > plain


def test_exit_leaves_at_once(chat):
    outcome = chat("/exit\nthe cat\n")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_without_a_chat_template_generate_is_named(run, tiny_checkpoint):
    outcome = run("chat", "--model", tiny_checkpoint, stdin=b"the cat\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert "ssd-jax generate" in outcome.err


def test_a_turn_beyond_the_context_ends_a_pipe(chat):
    outcome = chat(f"the cat\n{'x' * 70}\nthe cat\n", "--quiet")
    assert outcome.code == 2
    assert outcome.out.count("\n") == 1
    assert "context holds 64" in outcome.err


def test_stdin_must_be_utf8(chat):
    outcome = chat("caf\xe9\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert "UTF-8" in outcome.err


def test_an_answer_is_cut_to_the_room_that_is_left(chat):
    turn = "x" * (64 - 30)
    outcome = chat(turn, "--json", "--max-tokens", "500", "--ignore-eos")
    assert sum(json.loads(outcome.out)["usage"].values()) == 64


def test_a_terminal_goes_on_after_refusals_and_interrupts(chat, monkeypatch):
    script = iter([KeyboardInterrupt(), "the cat", "x" * 70, "/reset", "the cat", EOFError()])

    def say(prompt):
        turn = next(script)
        if isinstance(turn, BaseException):
            raise turn
        return turn

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr("ssd_jax.cli.chat.is_terminal", lambda: True)
    outcome = chat("", "--quiet")
    first, second = outcome.out.splitlines()
    assert outcome.code == 0
    assert first == second
    assert "context holds 64" in outcome.err


def test_the_history_alternates_and_forgets_refused_turns():
    seen = []

    def reply(messages):
        seen.append([message["content"] for message in messages])
        if messages[-1]["content"] == "too long":
            raise RequestError("no")
        return said(f"re {messages[-1]['content']}")

    converse(["a", "too long", "b"], [], reply, interactive=True)
    assert seen == [["a"], ["a", "re a", "too long"], ["a", "re a", "b"]]


@pytest.mark.parametrize("text", ["half", ""])
def test_an_interrupted_answer_stays_in_the_history_as_far_as_it_came(text):
    seen = []

    def reply(messages):
        seen.append([message["content"] for message in messages])
        return SimpleNamespace(text=text, completion=None)

    converse(["a", "b"], [], reply, interactive=True)
    assert seen[1] == (["a", "half", "b"] if text else ["b"])
    with pytest.raises(KeyboardInterrupt):
        converse(["a", "b"], [], reply, interactive=False)
