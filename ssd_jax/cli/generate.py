"""`ssd-jax generate`: text that continues a prompt."""

import argparse
import sys
from pathlib import Path

from ssd_jax.cli.flags import (
    DEFAULT_MAX_TOKENS,
    add_shared_flags,
    add_template_flags,
    check_output_flags,
    refuse_template_flags,
    sampling_params,
    template_variables,
)
from ssd_jax.errors import RequestError

_INTERRUPTED_CODE = 130


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_generate` reads."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "text",
        metavar="PROMPT",
        nargs="?",
        help="text to continue, or with --chat to answer; - reads it, as it is, from stdin",
    )
    prompt.add_argument("-p", "--prompt", metavar="PROMPT", help="the same as a flag")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="send the prompt through the model's chat template, as one message of a user "
        "(default: no)",
    )
    parser.add_argument(
        "--echo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print the prompt before the text, not in JSON (default: no)",
    )
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="with --method ssd: decode once more and write when each program ran, as a picture "
        "(.png) or as a trace for Perfetto (.json) (default: no)",
    )
    add_template_flags(parser.add_argument_group("chat template, with --chat"))
    add_shared_flags(parser)


def run_generate(args: argparse.Namespace) -> int:
    """Exit code, after the continuation went to stdout.

    Raises:
        SsdJaxError: the model or the request cannot be served.
    """
    check_output_flags(args)
    _check_timeline(args)
    if not args.chat:
        refuse_template_flags(args)
    elif args.echo:
        raise RequestError("--echo is for text that continues its prompt: leave out --chat or it.")
    prompt = _prompt(args)

    from ssd_jax.cli.answer import INTERRUPTED, print_answer, refuse_failed
    from ssd_jax.cli.session import open_model
    from ssd_jax.cli.speculation import open_speculation
    from ssd_jax.cli.templated import require_template, take_recommended
    from ssd_jax.engine.ssd_options import SSD

    model, tokenizer = open_model(args)
    if args.chat:
        variables = template_variables(args, require_template(tokenizer))
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        prompt_ids = tokenizer.encode_chat(messages, extra=variables)
    else:
        prompt_ids = tokenizer.encode(prompt)
    params = sampling_params(
        args,
        model.config.max_context - len(prompt_ids),
        recommended=take_recommended(args, tokenizer, by_default=args.chat),
        default_max_tokens=None if args.chat else DEFAULT_MAX_TOKENS,
    )
    speculation = open_speculation(args, model, params)
    if args.echo and not args.json:
        print(prompt, end="", flush=True)
    answer = print_answer(
        model, speculation, prompt_ids, params, args, wrap=args.chat, as_reply=args.chat
    )
    refuse_failed(answer)
    if args.timeline and isinstance(speculation, SSD):
        from ssd_jax.cli.timeline import write_timeline

        write_timeline(model, speculation, prompt_ids, params, args)
    return _INTERRUPTED_CODE if answer.finish_reason == INTERRUPTED else 0


def _check_timeline(args: argparse.Namespace) -> None:
    """Refuse what could not be written, before anything is decoded."""
    if not args.timeline:
        return
    if args.method != "ssd":
        raise RequestError("--timeline shows the rounds of --method ssd: leave out --timeline.")
    if Path(args.timeline).suffix not in (".png", ".json"):
        raise RequestError(
            f"--timeline takes a .png (a picture) or a .json (a trace), got {args.timeline}."
        )


def _prompt(args: argparse.Namespace) -> str:
    """The prompt, wherever it stands; an argument wins over the flag's variable."""
    prompt = args.prompt if args.text is None else args.text
    if prompt is None:
        raise RequestError(
            "Expected a PROMPT to continue, got none; give a text, or - to read it from stdin."
        )
    return _read_stdin() if prompt == "-" else prompt


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"Expected a UTF-8 prompt on stdin, got a broken character at byte {error.start}; "
            "convert it first."
        ) from error
