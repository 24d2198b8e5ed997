"""`ssd-jax generate`: text that continues a prompt."""

import argparse
import sys
from pathlib import Path

from ssd_jax.cli.flags import add_shared_flags, check_output_flags, sampling_params
from ssd_jax.errors import RequestError

_INTERRUPTED_CODE = 130


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_generate` reads."""
    parser.add_argument(
        "prompt", metavar="PROMPT", help="text to continue; - reads it, as it is, from stdin"
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
    add_shared_flags(parser)


def run_generate(args: argparse.Namespace) -> int:
    """Exit code, after the continuation went to stdout.

    Raises:
        SsdJaxError: the model or the request cannot be served.
    """
    check_output_flags(args)
    _check_timeline(args)
    prompt = _read_stdin() if args.prompt == "-" else args.prompt

    from ssd_jax.cli.answer import INTERRUPTED, print_answer
    from ssd_jax.cli.session import open_model
    from ssd_jax.cli.speculation import open_speculation
    from ssd_jax.engine.ssd_options import SSD

    model, tokenizer = open_model(args)
    prompt_ids = tokenizer.encode(prompt)
    params = sampling_params(args, model.config.max_context - len(prompt_ids))
    speculation = open_speculation(args, model, params)
    if args.echo and not args.json:
        print(prompt, end="", flush=True)
    answer = print_answer(model, speculation, prompt_ids, params, args)
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


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"Expected a UTF-8 prompt on stdin, got a broken character at byte {error.start}; "
            "convert it first."
        ) from error
