"""What `--method` and the flags beside it ask for, made and checked."""

import argparse
import dataclasses
import sys

from ssd_jax.cli.flags import AUTO
from ssd_jax.cpu_clients import draft_cpu
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.round_times import measure_pass_times, measure_round_times
from ssd_jax.engine.speculation import DEFAULT_DRAFT_LEN, Speculation, check_pair
from ssd_jax.engine.ssd import SSD
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut
from ssd_jax.model import Model, demo_folder, load_model
from ssd_jax.placement import place_model, spare_device
from ssd_jax.sampling_params import SamplingParams

MOST_AUTO = 8  # most tokens that a draft model proposes with --draft-len auto
METHODS_WITH_MODEL = ("draft", "combined", "ssd")
_SSD_FLAGS = ("fan_out", "fan_out_after_miss", "fallback", "miss_weight")


def open_speculation(
    args: argparse.Namespace, model: Model, params: SamplingParams
) -> Speculation | SSD | None:
    """The speculation that the arguments ask for, its draft model loaded; None for none.

    With `--draft-len auto` it comes with measured times, taken for these sampling options.

    Raises:
        RequestError: a flag that the method has no use for, or no draft for an own model.
        ConfigError: target and draft do not go together.
    """
    method = args.method or ("draft" if args.draft_model else "ar")
    _refuse_unused(args, method)
    if method == "ssd":
        return _open_ssd(args, model)
    if method == "ar" and not args.exact:
        return None
    draft = ngram = None
    auto = args.draft_len == AUTO
    draft_len = MOST_AUTO if auto else args.draft_len
    if method in ("ngram", "combined"):
        ngram = NgramConfig(kind=args.ngram_kind, n=args.ngram_n)
        if draft_len is not None and method == "ngram" and not auto:
            ngram = dataclasses.replace(ngram, max_draft=draft_len)
    if method in METHODS_WITH_MODEL:
        draft = _load_draft(args, model, method)
    speculation = Speculation(
        draft=draft,
        ngram=ngram,
        draft_len=DEFAULT_DRAFT_LEN if draft_len is None else draft_len,
        verification=args.verification,
        exact=args.exact,
        synthetic_acceptance=args.synthetic_acceptance,
    )
    if args.exact and not args.quiet:
        print(_exactness_cost(model, speculation, params), file=sys.stderr)
    if not auto:
        return speculation
    times = measure_round_times(model, speculation, params)
    return dataclasses.replace(speculation, round_times=times)


def _open_ssd(args: argparse.Namespace, model: Model) -> SSD:
    """Options of speculative speculative decoding, the draft on a device of its own if any."""
    draft = _load_draft(args, model, "ssd")
    if args.draft_device == "auto":
        draft = place_model(draft, draft_cpu() or spare_device(model))
    draft_len = DEFAULT_DRAFT_LEN if args.draft_len is None else args.draft_len
    options = {"fan_out": args.fan_out, "miss_weight": args.miss_weight, "fallback": args.fallback}
    given = {name: value for name, value in options.items() if value is not None}
    if args.fan_out_after_miss is not None:
        after_hit = SSD(draft=draft, draft_len=draft_len, **given).speculator.fan_out.after_hit
        given["fan_out"] = FanOut(after_hit=after_hit, after_miss=args.fan_out_after_miss)
    return SSD(
        draft=draft,
        draft_len=draft_len,
        ngram=NgramConfig(kind=args.ngram_kind, n=args.ngram_n),
        verification=args.verification,
        synthetic_acceptance=args.synthetic_acceptance,
        **given,
    )


def _refuse_unused(args: argparse.Namespace, method: str) -> None:
    """Name the first flag that is given and that the method has no use for."""

    def refuse(unused: object, flag: str, why: str) -> None:
        if unused:
            raise RequestError(f"--method {method} {why}: leave out {flag}.")

    uses_model = method in METHODS_WITH_MODEL
    refuse(args.draft_model and not uses_model, "--draft-model", "uses no draft model")
    refuse(
        method == "ar" and args.synthetic_acceptance is not None,
        "--synthetic-acceptance",
        "drafts nothing",
    )
    for name in _SSD_FLAGS:
        given = getattr(args, name) is not None
        refuse(given and method != "ssd", "--" + name.replace("_", "-"), "guesses no outcomes")
    refuse(method == "ssd" and args.exact, "--exact", "has passes of one width anyway")
    refuse(method == "ssd" and args.draft_len == AUTO, "--draft-len auto", "takes a number")


def _load_draft(args: argparse.Namespace, model: Model, method: str) -> Model:
    if args.model and not args.draft_model:
        raise RequestError(f"--method {method} needs --draft-model for a model of your own.")
    draft = load_model(args.draft_model or demo_folder("draft"), args.dtype)
    check_pair(model, draft)
    return draft


def _exactness_cost(model: Model, speculation: Speculation, params: SamplingParams) -> str:
    (width,) = speculation.widths
    times = measure_pass_times(model, (1, width), params)
    return (
        f"exact: every pass takes {width} tokens, {times[width] / times[1]:.2f} times as long as a "
        f"pass of one ({times[1] * 1e3:.2f} ms)"
    )
