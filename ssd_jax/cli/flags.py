"""The flags that `generate` and `chat` share, and what they make: sampling options."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ssd_jax.cli.parser import number, whole_number
from ssd_jax.errors import RequestError
from ssd_jax.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256
AUTO = "auto"
# Short and second names mean what they mean in llama.cpp (-m, -n, -s, -p, -sys, -md, --temp) or
# vLLM and MLX (--system-prompt); its -t are threads and its -c a context size, so neither is here.
_SECOND_NAMES = {"--temperature": ("--temp",)}
_SAMPLING_FLAGS: tuple[tuple[str, Callable[[str], float], str, str], ...] = (
    ("--temperature", number, "T", "0 is greedy (default: 0)"),
    ("--top-k", whole_number, "K", "keep the K most likely tokens, 0 for all (default: 0)"),
    (
        "--top-p",
        number,
        "P",
        "keep the most likely tokens up to this probability, in (0, 1] (default: 1)",
    ),
    (
        "--min-p",
        number,
        "P",
        "drop tokens below this share of the most likely one, in [0, 1) (default: 0)",
    ),
    ("--repetition-penalty", number, "X", "of tokens seen so far, 1 is none (default: 1)"),
    ("--presence-penalty", number, "X", "off the logit of emitted tokens (default: 0)"),
    ("--frequency-penalty", number, "X", "the same for each time emitted (default: 0)"),
)


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags on model, sampling, output and device."""
    add_model_flags(parser.add_argument_group("model"))
    _add_speculation_flags(parser.add_argument_group("speculation"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    _add_ending_flags(parser.add_argument_group("end of the output"))
    _add_output_flags(parser.add_argument_group("what is printed"))
    add_device_flags(parser.add_argument_group("device"))


def check_output_flags(args: argparse.Namespace) -> None:
    """Refuse what would be computed and never be printed.

    Raises:
        RequestError: naming the flag.
    """
    if args.logprobs is not None and not args.json:
        raise RequestError("--logprobs are printed with --json only: add --json, or leave it out.")


def sampling_params(
    args: argparse.Namespace,
    room: int,
    *,
    recommended: Mapping[str, Any] | None = None,
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
) -> SamplingParams:
    """The sampling options that the arguments ask for; `room` tokens are left in the context.

    `recommended` holds options for which no flag is given, by the names of `SamplingParams`.
    Without `--max-tokens` `default_max_tokens` (None: nothing) and the room bound the output.
    """
    max_tokens = args.max_tokens
    if max_tokens is None and default_max_tokens is not None and room > 0:
        max_tokens = min(default_max_tokens, room)
    return SamplingParams(
        **{**(recommended or {}), **sampling_options(args)},
        max_tokens=max_tokens,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_id),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_sampling_flags` say, by the names of `SamplingParams`.

    Options whose flag is not given are left out.
    """
    names = [flag.removeprefix("--").replace("-", "_") for flag, *_ in _SAMPLING_FLAGS]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return given | {"logit_bias": dict(args.logit_bias), "seed": args.seed}


def add_template_flags(group: argparse._ArgumentGroup) -> None:
    """Declare what a chat template is given, and whether its model's sampling is taken over."""
    group.add_argument(
        "-sys",
        "--system",
        "--system-prompt",
        metavar="TEXT",
        help="system message (default: none)",
    )
    group.add_argument(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        help="set the chat template's enable_thinking, as Qwen3's has it (default: the template's)",
    )
    group.add_argument(
        "--template-arg",
        action="append",
        type=_template_arg,
        default=(),
        metavar="K=V",
        help="set the chat template's variable K to V, read as JSON if it is that, else as text "
        "(repeatable)",
    )
    group.add_argument(
        "--generation-config",
        action=argparse.BooleanOptionalAction,
        help="sample as the model's generation_config.json says where no flag is given (default: "
        "yes where a chat template is used)",
    )


def template_variables(args: argparse.Namespace, template: str) -> dict[str, Any]:
    """The variables that the arguments set in a chat template.

    Raises:
        RequestError: one that the template does not know, or that is set twice.
    """
    variables: dict[str, Any] = {}
    given = list(args.template_arg)
    if args.enable_thinking is not None:
        given.append(("enable_thinking", args.enable_thinking))
    for name, value in given:
        if name in variables:
            raise RequestError(f"The template's variable {name} is set twice: leave one out.")
        if re.search(rf"\b{name}\b", template) is None:
            raise RequestError(
                f"The chat template of this model has no variable {name}: leave it out, or see "
                "which ones it has in the model's chat_template.jinja or tokenizer_config.json."
            )
        variables[name] = value
    return variables


def refuse_template_flags(args: argparse.Namespace) -> None:
    """Refuse flags that only a chat template has a use for.

    Raises:
        RequestError: naming the first of them.
    """
    given = {
        "--system": args.system is not None,
        "--enable-thinking": args.enable_thinking is not None,
        "--template-arg": bool(args.template_arg),
    }
    for flag, is_given in given.items():
        if is_given:
            raise RequestError(f"{flag} is for a chat template: add --chat, or leave it out.")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Declare which target, and in which precision."""
    group.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="checkpoint folder, converted or in the Hugging Face layout, or else OWNER/NAME or "
        "OWNER/NAME@REVISION on the Hugging Face hub (default: the demo model)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="precision of weights and cache (default: float32 on a CPU, else as stored)",
    )


def add_draft_flags(group: argparse._ArgumentGroup) -> None:
    """Declare which draft model, where it runs, and how what it drafts is verified."""
    group.add_argument(
        "-md",
        "--draft-model",
        metavar="MODEL",
        help="the draft, a folder or a name as for --model (default where a method needs one: the "
        "demo draft, which goes with the demo model)",
    )
    group.add_argument(
        "--draft-device",
        choices=("auto", "same"),
        default="auto",
        help="ssd: auto gives the draft a device of its own, on a CPU one of its cores; same puts "
        "it where the target is (default: auto)",
    )
    group.add_argument(
        "--verification",
        choices=("coupled", "rejection", "greedy"),
        default="coupled",
        help="when sampling: coupled emits the tokens of --method ar with the same seed, rejection "
        "others of the same distribution and accepts more; greedy is for temperature 0, where all "
        "three agree (default: coupled)",
    )


def _add_speculation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        choices=("ar", "draft", "ngram", "combined", "ssd"),
        help="ar decodes token by token; draft verifies what a draft model proposes; ngram what "
        "followed the same tokens before; combined does the latter where it can, else the former; "
        "ssd prepares the next drafts while one is verified (default: draft if --draft-model is "
        "given, else ar)",
    )
    add_draft_flags(group)
    group.add_argument(
        "-k",
        "--draft-len",
        type=_draft_len,
        metavar="N",
        help="most tokens drafted in a round, 1 to 64, of combined by the model (default: 4, for "
        "ngram 11); auto measures what rounds cost and drafts as much as pays, or nothing",
    )
    _add_switch(
        group,
        "--measure-again",
        "-k auto: measure although times of an earlier run are kept, and keep the new ones",
        default=False,
    )
    group.add_argument(
        "--ngram-kind",
        choices=("simple", "map", "mod"),
        default="simple",
        help="what ngram copies: simple what followed the last tokens last time, map what followed "
        "them most often, mod token by token from one hash table (default: simple)",
    )
    group.add_argument(
        "--ngram-n",
        type=whole_number,
        metavar="N",
        help="tokens that must be the same, 1 to 64 (default: 3, for mod 6)",
    )
    _add_switch(
        group,
        "--exact",
        "every pass of the target takes draft-len + 1 tokens, with --method ar too, so that "
        "bfloat16 ties fall the same way; says what that costs",
        default=False,
    )
    group.add_argument(
        "-f",
        "--fan-out",
        type=_fan_out,
        metavar="N[,N...]",
        help="ssd: bonus tokens guessed for 0, 1, ... draft-len accepted tokens, or one number for "
        "all (default: 3)",
    )
    group.add_argument(
        "--fan-out-after-miss",
        type=_fan_out,
        metavar="N,N[,N...]",
        help="ssd: the same after an outcome that was not prepared (default: as --fan-out)",
    )
    group.add_argument(
        "--fallback",
        choices=("neural", "ngram"),
        help="ssd: who drafts where an outcome was not prepared: the draft model while the target "
        "waits, or n-grams at once (default: neural)",
    )
    group.add_argument(
        "--miss-weight",
        type=number,
        metavar="C",
        help="ssd with --verification rejection: Saguaro sampling's C, from 0 to 1; below 1 "
        "rejections are guessed more often and drafts accepted less (default: 1)",
    )
    group.add_argument(
        "--tuned",
        metavar="FILE",
        help="ssd: take draft-len, fan-out, fallback and miss-weight from a file that `ssd-jax "
        "tune` wrote; flags given beside it win",
    )
    group.add_argument(
        "--synthetic-acceptance",
        type=number,
        metavar="RATE",
        help="accept drafted tokens with this probability whatever they are, to measure speed: the "
        "text is then NOT the model's (default: off)",
    )
    group.add_argument(
        "--synthetic-hit-rate",
        type=number,
        metavar="RATE",
        help="ssd with --synthetic-acceptance: count outcomes as prepared with this probability, "
        "whatever was guessed (default: off)",
    )


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Declare how tokens are chosen."""
    for flag, convert, metavar, text in _SAMPLING_FLAGS:
        name = flag.removeprefix("--").replace("-", "_")
        names = (flag, *_SECOND_NAMES.get(flag, ()))
        group.add_argument(*names, type=_option(name, convert), metavar=metavar, help=text)
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_logit_bias,
        default=(),
        metavar="ID=VALUE",
        help="add VALUE to the logit of token ID, -inf forbids it (repeatable)",
    )
    group.add_argument(
        "-s",
        "--seed",
        type=_option("seed", whole_number),
        default=0,
        metavar="S",
        help="the same seed gives the same output; 64 bits (default: 0)",
    )


def _add_ending_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-n",
        "--max-tokens",
        type=_option("max_tokens", whole_number),
        metavar="N",
        help=f"most tokens to emit (default: {DEFAULT_MAX_TOKENS}, or what the context still holds "
        "if that is less; for an answer in a chat, whatever the context holds)",
    )
    group.add_argument(
        "--stop",
        action="append",
        type=_stop,
        default=(),
        metavar="TEXT",
        help="end before this text (repeatable)",
    )
    group.add_argument(
        "--stop-token-id",
        action="append",
        type=whole_number,
        default=(),
        metavar="ID",
        help="end at this token (repeatable)",
    )
    _add_switch(group, "--ignore-eos", "go on past the model's end-of-text tokens", default=False)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--logprobs",
        type=_option("logprobs", whole_number),
        metavar="N",
        help="with --json: log-probability (nats) of each token and of the N most likely, 0 to 64",
    )
    _add_switch(group, "--json", "one JSON object instead of text", default=False)
    _add_switch(group, "--stream", "text as it comes rather than at the end", default=True)
    _add_switch(group, "--quiet", "no statistics on stderr", default=False)


def add_device_flags(group: argparse._ArgumentGroup) -> None:
    """Declare where compiled programs are kept."""
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept for the next run, 'off' for nowhere (default: a "
        "folder in the user's cache folder, see `ssd-jax doctor`)",
    )
    group.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_const",
        const="off",
        help="the same as --compilation-cache off",
    )


def _add_switch(group: argparse._ArgumentGroup, flag: str, text: str, *, default: bool) -> None:
    state = "yes" if default else "no"
    group.add_argument(
        flag,
        action=argparse.BooleanOptionalAction,
        default=default,
        help=f"{text} (default: {state})",
    )


def _option(name: str, convert: Callable[[str], float]) -> Callable[[str], float]:
    """A converter that refuses what `SamplingParams` refuses for the field of that name."""

    def read(text: str) -> float:
        value = convert(text)
        _check({name: value})
        return value

    return read


def _draft_len(text: str) -> int | str:
    return AUTO if text == AUTO else whole_number(text)


def _fan_out(text: str) -> int | tuple[int, ...]:
    counts = tuple(whole_number(part) for part in text.split(","))
    return counts if "," in text else counts[0]


def _logit_bias(text: str) -> tuple[int, float]:
    token, separator, bias = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected ID=VALUE, got {text!r}")
    entry = whole_number(token), number(bias)
    _check({"logit_bias": dict([entry])})
    return entry


def _template_arg(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected K=V, K a name, got {text!r}")
    try:
        return name, json.loads(value, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return name, value


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")  # which Python's reader would take


def _stop(text: str) -> str:
    _check({"stop": (text,)})
    return text


def _check(options: dict[str, Any]) -> None:
    try:
        dataclasses.replace(SamplingParams(), **options)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
