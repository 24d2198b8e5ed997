import json

import pytest

from ssd_jax.cli import answer
from ssd_jax.cli.chat import converse
from ssd_jax.cli.conversation import Conversation
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


def test_each_line_of_a_pipe_is_a_turn(chat):
    outcome = chat("the cat\n\nthe cat\n/clear\nthe cat\n", "--json", "--ignore-eos")
    first, second, third = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 0
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert (third["text"], third["usage"]) == (first["text"], first["usage"])


def test_the_system_message_is_part_of_the_prompt_even_after_a_reset(chat):
    counts = []
    for options in ((), ("--system", "dog")):
        outcome = chat("the cat\n/clear\nthe cat\n", "--json", *options)
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
    turns = ["the cat", "x" * 70, "/bla", "/clear", "the cat"]
    monkeypatch.setattr("ssd_jax.cli.chat.is_terminal", lambda: True)
    monkeypatch.setattr("ssd_jax.cli.chat.make_session", lambda: None)
    monkeypatch.setattr("ssd_jax.cli.chat.type_turns", lambda session: iter(turns))
    outcome = chat("", "--quiet")
    first, second = outcome.out.splitlines()
    assert outcome.code == 0
    assert first == second
    refused, unknown, cleared = outcome.err.splitlines()
    assert "context holds 64" in refused
    assert "/clear" in refused
    assert "no command '/bla'" in unknown
    assert cleared == "cleared"


def test_unknown_commands_end_a_pipe(chat):
    outcome = chat("/bla\nthe cat\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no command '/bla'" in outcome.err


def test_a_cut_answer_says_so_and_goes_on(chat):
    whole = chat("the cat\n", "--json", "--ignore-eos", "-n", "8")
    parts = chat("the cat\n/continue\n", "--json", "--ignore-eos")
    ids = [json.loads(line)["token_ids"] for line in parts.out.splitlines()]
    assert [*ids[0], *ids[1]] == json.loads(whole.out)["token_ids"]
    assert parts.err.count("cut at 4 tokens by --max-tokens: /continue goes on") == 2


def test_what_was_continued_is_one_message(chat, tmp_path):
    file = tmp_path / "talk.json"
    outcome = chat(f"the cat\n/continue\n/save {file}\n", "--ignore-eos", "--quiet")
    question, answer = json.loads(file.read_text())
    assert question == {"role": "user", "content": "the cat"}
    assert answer == {"role": "assistant", "content": outcome.out.replace("\n", "")}


def test_retry_takes_another_seed_and_says_where_that_does_nothing(chat):
    sampled = chat("the cat\n/retry\n/retry\n", "--json", "--temp", "1", "-n", "12")
    accounts = [json.loads(line) for line in sampled.out.splitlines()]
    assert [account["seed"] for account in accounts] == [0, 1, 2]
    assert len({account["text"] for account in accounts}) == 3
    assert "greedy" not in sampled.err
    assert "greedy decoding gives the same answer" in chat("the cat\n/retry\n").err


def test_an_answer_without_limit_is_as_long_as_the_context(run, chat_checkpoint):
    outcome = run(
        *("chat", "--model", chat_checkpoint, "--json", "--ignore-eos"), stdin=b"the cat\nthe cat\n"
    )
    assert outcome.code == 2
    assert sum(json.loads(outcome.out)["usage"].values()) == 64
    assert "the model's context of 64 tokens is full: /clear begins again" in outcome.err
    assert "begin again with /clear" in outcome.err.splitlines()[-1]


def answering(seen):
    def reply(conversation, go_on):
        question = conversation.messages[-1]["content"]
        seen.append([message["content"] for message in conversation.messages])
        if question == "too long":
            raise RequestError("no")
        if question == "interrupted":
            raise KeyboardInterrupt
        return conversation.with_answer(f"re {question}")

    return reply


@pytest.mark.parametrize("turn", ["too long", "interrupted"])
def test_the_history_alternates_and_forgets_refused_turns(turn):
    seen = []
    converse(["a", turn, "b"], Conversation(), answering(seen), interactive=True)
    assert seen == [["a"], ["a", "re a", turn], ["a", "re a", "b"]]


def test_in_a_pipe_refusals_and_interrupts_end_it():
    for turn, kind in (("too long", RequestError), ("interrupted", KeyboardInterrupt)):
        with pytest.raises(kind):
            converse([turn, "b"], Conversation(), answering([]), interactive=False)


@pytest.fixture
def interrupt(monkeypatch):
    """Sets after how many pieces of each answer Ctrl-C comes."""
    whole = answer.stream_answer

    def interrupt(after):
        def stream(*arguments, **options):
            for index, delta in enumerate(whole(*arguments, **options)):
                if index == after:
                    raise KeyboardInterrupt
                yield delta

        monkeypatch.setattr(answer, "stream_answer", stream)

    return interrupt


def test_an_interrupted_answer_stays_as_far_as_it_came(chat, interrupt, monkeypatch, tmp_path):
    file = tmp_path / "talk.json"
    turns = ["the cat", f"/save {file}", "/continue"]
    monkeypatch.setattr("ssd_jax.cli.chat.is_terminal", lambda: True)
    monkeypatch.setattr("ssd_jax.cli.chat.make_session", lambda: None)
    monkeypatch.setattr("ssd_jax.cli.chat.type_turns", lambda session: iter(turns))
    options = ("-n", "12", "--ignore-eos")
    whole = chat("", *options).out.splitlines()[0]
    file.unlink()
    interrupt(1)
    first, second = chat("", *options).out.splitlines()
    assert json.loads(file.read_text())[1]["content"] == first
    assert whole.startswith(first + second)


def test_an_interrupt_ends_a_pipe(chat, interrupt):
    interrupt(1)
    outcome = chat("the cat\nthe cat\n", "-n", "12", "--ignore-eos")
    assert outcome.code == 130
    assert outcome.out.count("\n") == 1
