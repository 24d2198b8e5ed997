"""`ssd-jax chat`: a conversation through the model's chat template."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ssd_jax.cli.flags import add_shared_flags, check_output_flags, sampling_params
from ssd_jax.errors import RequestError, SsdJaxError

if TYPE_CHECKING:
    from ssd_jax.cli.answer import Answer

type Message = dict[str, str]
_HINT = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C interrupts an answer."


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_chat` reads."""
    parser.epilog = f"{_HINT} If stdin is not a terminal, each of its lines is a turn."
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    add_shared_flags(parser)


def run_chat(args: argparse.Namespace) -> int:
    """Exit code, after the conversation ended; answers go to stdout.

    On a terminal a turn that cannot be served is refused in words and the conversation goes on;
    otherwise it ends the program, so that a script notices.

    Raises:
        SsdJaxError: no model, no chat template, or (not on a terminal) a turn that is refused.
    """
    check_output_flags(args)

    from ssd_jax.cli.answer import print_answer
    from ssd_jax.cli.session import open_model
    from ssd_jax.cli.speculation import open_speculation

    model, tokenizer = open_model(args)
    speculation = open_speculation(args, model, sampling_params(args, model.config.max_context))
    if tokenizer.chat_template is None:
        raise RequestError(
            "Expected a model with a chat template, got one without; use `ssd-jax generate`."
        )

    def reply(messages: Sequence[Message]) -> "Answer":
        prompt_ids = tokenizer.encode_chat(messages)
        context = model.config.max_context
        room = context - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"With this turn the conversation has {len(prompt_ids)} tokens, but the model's "
                f"context holds {context}; shorten the turn, or begin again with /reset."
            )
        params = sampling_params(args, room)
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens or room, room))
        return print_answer(model, speculation, prompt_ids, params, args)

    interactive = is_terminal()
    if interactive and not args.quiet:
        print(_HINT, file=sys.stderr)
    opening: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    converse(_turns(interactive), opening, reply, interactive=interactive)
    return 0


def is_terminal() -> bool:
    """Whether somebody is there to type."""
    return sys.stdin.isatty()


def converse(
    turns: Iterable[str],
    opening: Sequence[Message],
    reply: Callable[[Sequence[Message]], "Answer"],
    *,
    interactive: bool,
) -> None:
    """Answer the turns one after the other until they end or one of them is /exit.

    Raises:
        SsdJaxError: `reply` refused a turn, and nobody is there to try another.
        KeyboardInterrupt: an answer was interrupted, and nobody is there to go on.
    """
    messages = list(opening)
    for turn in turns:
        if turn == "/exit":
            return
        if turn == "/reset":
            messages = list(opening)
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": turn}]
        try:
            answer = reply(asked)
        except SsdJaxError as error:
            if not interactive:
                raise
            print(error, file=sys.stderr)
            continue
        if answer.completion is None and not interactive:
            raise KeyboardInterrupt
        if answer.text:
            messages = [*asked, {"role": "assistant", "content": answer.text}]


def _turns(interactive: bool) -> Iterator[str]:
    """What the user says, blank lines left out, until the input ends."""
    if interactive:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401 (gives `input` editing and history)
    while True:
        try:
            turn = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(file=sys.stderr)
            continue
        if turn:
            yield turn
