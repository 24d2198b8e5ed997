"""`ssd-jax chat`: a conversation through the model's chat template."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable

from ssd_jax.cli.chat_commands import interpret
from ssd_jax.cli.conversation import Conversation
from ssd_jax.cli.flags import (
    add_shared_flags,
    add_template_flags,
    check_output_flags,
    sampling_params,
    template_variables,
)
from ssd_jax.cli.line_editor import keys_unseen, make_session, read_turns, type_turns
from ssd_jax.cli.notes import note
from ssd_jax.errors import RequestError, SsdJaxError

_HINT = "/help lists the commands, Ctrl-D leaves, Ctrl-C stops an answer; Alt-Enter: a new line"

# Gives the conversation with an answer, or with more of it.
type Reply = Callable[[Conversation, bool], Conversation]


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_chat` reads."""
    parser.epilog = (
        "/help in the chat lists its commands. If stdin is not a terminal, each of its lines is a "
        'turn; one that ends in \\ goes on in the next, and """ begins and ends a turn of many.'
    )
    add_template_flags(parser.add_argument_group("chat template"))
    add_shared_flags(parser)


def run_chat(args: argparse.Namespace) -> int:
    """Exit code, after the conversation ended; answers go to stdout.

    On a terminal a turn that cannot be served is refused in words and the conversation goes on;
    otherwise it ends the program, so that a script notices.

    Raises:
        SsdJaxError: no model, no chat template, or (not on a terminal) a turn that is refused.
    """
    check_output_flags(args)
    with keys_unseen():
        _chat(args)
    return 0


def is_terminal() -> bool:
    """Whether somebody is there to type, and to see it."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def _chat(args: argparse.Namespace) -> None:
    from ssd_jax.cli.answer import print_answer, refuse_failed
    from ssd_jax.cli.session import open_model
    from ssd_jax.cli.speculation import open_speculation
    from ssd_jax.cli.templated import require_template, take_recommended

    model, tokenizer = open_model(args)
    variables = template_variables(args, require_template(tokenizer))
    recommended = take_recommended(args, tokenizer, by_default=True)
    context = model.config.max_context
    usual = sampling_params(args, context, recommended=recommended)
    speculation = open_speculation(args, model, usual)

    def reply(conversation: Conversation, go_on: bool) -> Conversation:
        prompt_ids = conversation.open_ids or tuple(
            tokenizer.encode_chat(conversation.for_template(), extra=variables)
        )
        room = context - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"The conversation has {len(prompt_ids)} tokens, but the model's context holds "
                f"{context}: begin again with /clear, take turns back with /undo, or say less."
            )
        params = sampling_params(args, room, recommended=recommended, default_max_tokens=None)
        bound = None if params.max_tokens is None else min(params.max_tokens, room)
        seed = ((params.seed or 0) + conversation.attempt) % 2**64
        params = dataclasses.replace(params, max_tokens=bound, seed=seed)
        if conversation.attempt and not go_on and params.temperature == 0:
            note("greedy decoding gives the same answer again; --temperature 0.7 would not")
        answer = print_answer(
            model, speculation, prompt_ids, params, args, wrap=True, as_reply=not go_on
        )
        ids = (*prompt_ids, *answer.token_ids)
        if answer.completion is None and not is_terminal():
            raise KeyboardInterrupt
        refuse_failed(answer)
        if answer.finish_reason == "length" and not args.quiet:
            note(_why_cut(len(answer.token_ids), bound, len(ids), context))
        if not answer.text:
            note("no answer: the message is forgotten" if not go_on else "nothing more came")
            return conversation if go_on else conversation.without_last()
        is_cut = answer.finish_reason in ("length", "interrupted")
        return conversation.with_answer(answer.text, ids if is_cut else ())

    interactive = is_terminal()
    if interactive and not args.quiet:
        note(_HINT)
    turns = type_turns(make_session()) if interactive else read_turns(sys.stdin)
    converse(turns, Conversation(system=args.system), reply, interactive=interactive)


def converse(
    turns: Iterable[str], conversation: Conversation, reply: Reply, *, interactive: bool
) -> None:
    """Follow the turns one after the other until they end or one of them leaves.

    Raises:
        SsdJaxError: a turn is refused, and nobody is there to try another.
        KeyboardInterrupt: an answer was interrupted, and nobody is there to go on.
    """
    for turn in turns:
        try:
            step = interpret(conversation, turn)
            if step.note:
                note(step.note)
            if step.action == "leave":
                return
            conversation = (
                step.conversation
                if step.action == "wait"
                else reply(step.conversation, step.action == "continue")
            )
        except SsdJaxError as error:
            if not interactive:
                raise
            note(str(error), dim=False)
        except KeyboardInterrupt:  # before or after an answer
            if not interactive:
                raise


def _why_cut(num_tokens: int, bound: int | None, length: int, context: int) -> str:
    if length >= context:
        return (
            f"the model's context of {context} tokens is full: /clear begins again, /undo takes a "
            "turn back"
        )
    if bound is None:
        return f"cut at {num_tokens} tokens: the memory holds no longer text"
    return f"cut at {num_tokens} tokens by --max-tokens: /continue goes on"
