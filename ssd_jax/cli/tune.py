"""`ssd-jax tune`: SSD's options for this machine, measured, chosen and written to a file."""

import argparse
import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ssd_jax.cli.flags import (
    add_device_flags,
    add_draft_flags,
    add_model_flags,
    add_sampling_flags,
    sampling_options,
)
from ssd_jax.cli.parser import whole_number
from ssd_jax.errors import RequestError
from ssd_jax.json_files import shown_path
from ssd_jax.text.prompt_file import read_prompts

if TYPE_CHECKING:
    from ssd_jax.engine.ssd_options import SSD
    from ssd_jax.model import Model
    from ssd_jax.tuning.tune import Tuning
    from ssd_jax.tuning.tuned_file import Tuned

PROMPTS = (
    'def word_counts(path):\n    """How often each word occurs in a text file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "Question: A shop sells pens at 3 dollars each. How much do 12 pens cost?\nAnswer:",
    "Write a short note that thanks a friend for the help with moving house.\n",
    "It was late in the evening when the two travellers came to the old bridge, and",
    "The most important reasons to test a program before it is given to others are:\n1.",
)
DEFAULT_MAX_TOKENS = 128


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_tune` reads."""
    parser.set_defaults(method="ssd")
    parser.add_argument("--out", metavar="FILE", required=True, help="the TOML file to write")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts as like the later use as possible: JSON Lines or a JSON list of texts or of "
        "objects with a `prompt`, or a common evaluation set (default: a few bundled ones)",
    )
    parser.add_argument(
        "--max-tokens",
        type=whole_number,
        metavar="N",
        help=f"tokens to decode for each prompt (default: {DEFAULT_MAX_TOKENS})",
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=1,
        metavar="N",
        help="requests that will be decoded together (default: 1)",
    )
    model = parser.add_argument_group("models")
    add_model_flags(model)
    add_draft_flags(model)
    add_sampling_flags(parser.add_argument_group("sampling, as it will be for generate"))
    machine = parser.add_argument_group("device and output")
    add_device_flags(machine)
    machine.add_argument(
        "--quiet",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="no progress on stderr (default: no)",
    )


def run_tune(args: argparse.Namespace) -> None:
    """Measure, choose, write the file, and print what each draft length would reach.

    Raises:
        SsdJaxError: the models, the prompts or the file cannot be used.
    """
    out = Path(args.out)
    if not os.path.isdir(out.parent):  # Path.is_dir raises for a name that is too long
        raise RequestError(f"--out should be in a folder that exists, got {shown_path(out)}.")
    if args.batch_size < 1:
        raise RequestError(f"--batch-size should be 1 or more, got {args.batch_size}.")
    prompts = PROMPTS if args.prompts is None else read_prompts(Path(args.prompts))

    from ssd_jax.cli.busy import busy_in_turn
    from ssd_jax.cli.session import open_model
    from ssd_jax.cli.speculation import load_draft, place_draft
    from ssd_jax.engine.ssd_options import SSD
    from ssd_jax.sampling_params import SamplingParams
    from ssd_jax.tuning.tune import tune
    from ssd_jax.tuning.tuned_file import write_tuned

    model, tokenizer = open_model(args)
    draft = place_draft(args, model, load_draft(args, model, "ssd"))
    ssd = SSD(draft=draft, verification=args.verification)
    params = SamplingParams(
        max_tokens=DEFAULT_MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        ignore_eos=True,
        **sampling_options(args),
    )
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    context = min(model.config.max_context, draft.config.max_context)
    longest = context - params.max_tokens if params.max_tokens else context
    encoded = [ids for ids in encoded if ids and len(ids) <= longest]
    if not encoded:
        raise RequestError(
            f"No prompt leaves room for {params.max_tokens} tokens in a context of {context}: give "
            "shorter prompts or a smaller --max-tokens."
        )
    with busy_in_turn(quiet=args.quiet) as tell:
        tuning = tune(model, ssd, encoded, params, batch_size=args.batch_size, tell=tell)
    write_tuned(out, _report(args, model, ssd, tuning, len(encoded)))
    print(describe(tuning))
    print(f"written to {out}; use it with `ssd-jax generate --method ssd --tuned {out}`")


def describe(tuning: "Tuning") -> str:
    """The best setting of each draft length and what it should reach, as lines for people."""
    from ssd_jax.tuning.speed import choose

    best, times = tuning.best, tuning.times
    head = "draft_len outcomes fallback hits tokens/round verify prepare round tokens/s vs_ar"
    rows: list[tuple[str, ...]] = [tuple(head.split())]
    for draft_len in range(1, times.longest_draft + 1):
        one = choose(p for p in tuning.predictions if p.setting.draft_len == draft_len)
        if draft_len == best.setting.draft_len:
            one = best
        rows.append(
            (
                f"{'*' if one is best else ' '} {draft_len}",
                f"{one.setting.fan_out.num_branches}",
                one.setting.fallback,
                f"{one.hit_rate:.0%}",
                f"{one.tokens_per_round:.2f}",
                *(f"{s * 1e3:.2f} ms" for s in (one.verify_s, one.prepare_s, one.round_s)),
                f"{one.tokens_per_s:,.0f}",
                f"{one.tokens_per_s * times.verify_s[0]:.2f}x",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    after_hit, after_miss = best.setting.fan_out.after_hit, best.setting.fan_out.after_miss
    lines.append(
        f"chosen: draft_len {best.setting.draft_len}, fan-out {','.join(map(str, after_hit))} "
        f"(after a miss {','.join(map(str, after_miss))}), {best.setting.fallback} fallback, "
        f"miss_weight {best.setting.miss_weight:g}"
    )
    return "\n".join(lines)


def _report(
    args: argparse.Namespace,
    model: "Model",
    ssd: "SSD",
    tuning: "Tuning",
    num_prompts: int,
) -> "Tuned":
    import jax

    from ssd_jax.tuning.speed import crossover_batch
    from ssd_jax.tuning.tuned_file import Choice, Expected, Measured, OutcomeFigures, Tuned

    best, times, setting = tuning.best, tuning.times, tuning.best.setting
    own = tuning.behaviours[setting.fallback]
    short = {name: one.shortened(setting.draft_len) for name, one in tuning.behaviours.items()}
    neural, ngram = (
        best.hit_rate * short[setting.fallback].after_hit.tokens_per_round
        + (1 - best.hit_rate) * short[name].after_miss.tokens_per_round
        for name in ("neural", "ngram")
    )
    crossover = crossover_batch(
        best.hit_rate,
        times.lookup_s + max(best.verify_s, best.prepare_s),
        (neural, ngram),
        (times.fall_back("neural", setting.draft_len), times.ngram_s),
    )
    return Tuned(
        choice=Choice(
            draft_len=setting.draft_len,
            fan_out_after_hit=setting.fan_out.after_hit,
            fan_out_after_miss=setting.fan_out.after_miss,
            fallback=setting.fallback,
            miss_weight=setting.miss_weight,
        ),
        expected=Expected(
            hit_rate=best.hit_rate,
            tokens_per_round=best.tokens_per_round,
            round_s=best.round_s,
            tokens_per_s=best.tokens_per_s,
            autoregressive_tokens_per_s=1 / times.verify_s[0],
            crossover_batch=crossover,
        ),
        times=times,
        outcomes=OutcomeFigures(
            accepted_after_hit=tuple(own.after_hit.accepted.tolist()),
            accepted_after_miss=tuple(own.after_miss.accepted.tolist()),
            guesses_after_hit=tuple(own.after_hit.hits_by_rank.sum(0).tolist()),
            guesses_after_miss=tuple(own.after_miss.hits_by_rank.sum(0).tolist()),
        ),
        measured=Measured(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            target=args.model or "demo",
            draft=args.draft_model or "demo",
            target_devices=_devices(model),
            draft_devices=_devices(ssd.draft),
            cpu_cores=os.cpu_count() or 1,
            jax=jax.__version__,
            batch_size=args.batch_size,
            verification=args.verification,
            temperature=args.temperature or 0.0,
            num_prompts=num_prompts,
        ),
    )


def _devices(model: "Model") -> str:
    """How many devices of which kind hold a model's weights."""
    devices = model.params.embedding.devices()
    device = next(iter(devices))
    return f"{len(devices)} x {device.device_kind} ({device.platform})"
