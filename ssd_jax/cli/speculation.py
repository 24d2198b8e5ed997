"""What `--method` and the flags beside it ask for, made and checked."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from ssd_jax.cli.busy import busy
from ssd_jax.cli.environment import user_cache
from ssd_jax.cli.flags import AUTO
from ssd_jax.cli.model_name import named_folder
from ssd_jax.cpu_clients import draft_cpu
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.round_times import measure_pass_times, measure_round_times
from ssd_jax.engine.speculation import DEFAULT_DRAFT_LEN, RoundTimes, Speculation, check_pair
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import ConfigError, RequestError
from ssd_jax.fan_out import FanOut
from ssd_jax.model import Model, demo_folder, load_model
from ssd_jax.placement import place_model, spare_device
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.tuning.kept_times import circumstances, keep_times, read_times, times_file
from ssd_jax.tuning.tuned_file import Tuned, read_tuned

MOST_AUTO = 8  # most tokens that a draft model proposes with --draft-len auto
METHODS_WITH_MODEL = ("draft", "combined", "ssd")
_SSD_FLAGS = (
    "fan_out",
    "fan_out_after_miss",
    "fallback",
    "miss_weight",
    "tuned",
    "synthetic_hit_rate",
)


def open_speculation(
    args: argparse.Namespace, model: Model, params: SamplingParams
) -> Speculation | SSD | None:
    """The speculation that the arguments ask for, its draft model loaded; None for none.

    With `--draft-len auto` it comes with measured times, taken for these sampling options now or by
    an earlier run.

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
        draft = load_draft(args, model, method)
    speculation = Speculation(
        draft=draft,
        ngram=ngram,
        draft_len=DEFAULT_DRAFT_LEN if draft_len is None else draft_len,
        verification=args.verification,
        exact=args.exact,
        synthetic_acceptance=args.synthetic_acceptance,
    )
    if args.exact and not args.quiet:
        with busy("measuring what --exact costs", quiet=args.quiet):
            cost = _exactness_cost(model, speculation, params)
        print(cost, file=sys.stderr)
    if not auto:
        return speculation
    times = _round_times(args, model, speculation, params)
    return dataclasses.replace(speculation, round_times=times)


def _round_times(
    args: argparse.Namespace, model: Model, speculation: Speculation, params: SamplingParams
) -> RoundTimes:
    """What rounds cost, as it was kept or else measured and kept; a line on stderr says which."""
    folder = user_cache(os.environ) / "round-times"
    about = circumstances(model, speculation, params)

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    if not args.measure_again:
        try:
            kept = read_times(folder, about)
        except ConfigError:
            kept = None
            say(f"{times_file(folder, about)} is damaged and is written anew.")
        if kept is not None:
            say(
                f"Round times as measured on {kept.date}, kept in {times_file(folder, about)}; "
                "--measure-again takes them anew."
            )
            return kept.times
    with busy("measuring what rounds cost here, for -k auto", quiet=args.quiet):
        times = measure_round_times(model, speculation, params)
    try:
        path = keep_times(folder, about, times)
    except ConfigError as error:
        print(f"ssd-jax: warning: round times are not kept: {error}", file=sys.stderr)
    else:
        say(f"Round times measured, and kept for the next run in {path}.")
    return times


def _open_ssd(args: argparse.Namespace, model: Model) -> SSD:
    """Options of speculative speculative decoding, the draft on a device of its own if any.

    Those of a tuned file come first, and flags over them. Its fan-out is for its draft_len: with
    another one the default fan-out is back.
    """
    tuned = read_tuned(Path(args.tuned)) if args.tuned else None
    draft = place_draft(args, model, load_draft(args, model, "ssd"))
    draft_len = DEFAULT_DRAFT_LEN if args.draft_len is None else args.draft_len
    options: dict[str, Any] = {}
    if tuned is not None:
        setting = tuned.choice.setting
        options = {"fallback": setting.fallback, "miss_weight": setting.miss_weight}
        if args.draft_len is None or args.draft_len == setting.draft_len:
            draft_len, options["fan_out"] = setting.draft_len, setting.fan_out
        if setting.miss_weight != 1 and args.miss_weight is None:
            _check_tuned_verification(args, tuned)
    given = {"fan_out": args.fan_out, "miss_weight": args.miss_weight, "fallback": args.fallback}
    options |= {name: value for name, value in given.items() if value is not None}
    ssd = SSD(
        draft=draft,
        draft_len=draft_len,
        ngram=NgramConfig(kind=args.ngram_kind, n=args.ngram_n),
        verification=args.verification,
        synthetic_acceptance=args.synthetic_acceptance,
        synthetic_hit_rate=args.synthetic_hit_rate,
        **options,
    )
    if args.fan_out_after_miss is not None:
        after_hit = ssd.both_fan_outs.after_hit
        after_miss = args.fan_out_after_miss
        ssd = dataclasses.replace(ssd, fan_out=FanOut(after_hit=after_hit, after_miss=after_miss))
    if tuned is not None and not args.quiet:
        _warn_of_waiting(ssd, tuned)
    return ssd


def place_draft(args: argparse.Namespace, model: Model, draft: Model) -> Model:
    """The draft on the device that the arguments ask for."""
    if args.draft_device == "auto":
        return place_model(draft, draft_cpu() or spare_device(model))
    return draft


def _check_tuned_verification(args: argparse.Namespace, tuned: Tuned) -> None:
    if args.verification != tuned.measured.verification:
        raise RequestError(
            f"{args.tuned} has miss_weight {tuned.choice.miss_weight}, which is for --verification "
            f"{tuned.measured.verification}, got {args.verification}: give that flag as well, or "
            "--miss-weight 1."
        )


def _warn_of_waiting(ssd: SSD, tuned: Tuned) -> None:
    """Say on stderr when, by the tuned file's times, the target would wait for the draft."""
    times, num_branches = tuned.times, ssd.both_fan_outs.num_branches
    if ssd.draft_len > times.longest_draft:
        return
    verify_s = times.verify_s[ssd.draft_len]
    prepare_s = times.prepare(ssd.draft_len, num_branches)
    if prepare_s <= verify_s:
        return
    fits = times.budget(ssd.draft_len)
    remedy = f"{fits} would fit" if fits else "a shorter draft takes less"
    print(
        f"ssd-jax: warning: the draft sets the pace: preparing {num_branches} outcomes of "
        f"{ssd.draft_len} tokens takes {prepare_s * 1e3:.2f} ms and verifying "
        f"{verify_s * 1e3:.2f} ms (by the times in the tuned file); {remedy}.",
        file=sys.stderr,
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
    if args.measure_again and args.draft_len != AUTO:
        raise RequestError("--measure-again is for -k auto: add that, or leave it out.")
    refuse(method == "ssd" and args.exact, "--exact", "has passes of one width anyway")
    refuse(method == "ssd" and args.draft_len == AUTO, "--draft-len auto", "takes a number")


def load_draft(args: argparse.Namespace, model: Model, method: str) -> Model:
    """The draft model that the arguments name, on the default device.

    Raises:
        RequestError: a model of one's own without a draft of one's own.
        ConfigError: target and draft do not go together.
    """
    if args.model and not args.draft_model:
        raise RequestError(f"--method {method} needs --draft-model for a model of your own.")
    name = args.draft_model
    folder = demo_folder("draft") if name is None else named_folder(name, quiet=args.quiet)
    with busy(f"loading {name or 'the demo draft'}", quiet=args.quiet):
        draft = load_model(folder, args.dtype)
    check_pair(model, draft)
    return draft


def _exactness_cost(model: Model, speculation: Speculation, params: SamplingParams) -> str:
    (width,) = speculation.widths
    times = measure_pass_times(model, (1, width), params)
    return (
        f"exact: every pass takes {width} tokens, {times[width] / times[1]:.2f} times as long as a "
        f"pass of one ({times[1] * 1e3:.2f} ms)"
    )
