"""Decoding methods on the same prompts in one run: decode speed as ratios to plain decoding.

    python bench/speculation_speed.py --prompts HumanEval.jsonl.gz
    python bench/speculation_speed.py --workload copy-heavy --num-prompts 8 --out copy.json
    python bench/speculation_speed.py --workload nothing-repeats --methods ar ngram:kind=simple

The demo pair, or `--model` and `--draft-model`. Every method answers every prompt once unmeasured,
which compiles its programs and gives the outputs that are compared token by token; then the
methods take turns. Prefill and decode are timed apart. For the names of methods see
`bench/methods.py`, for the workloads `bench/workloads.py`. One JSON record, on stdout or in --out.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from bench.methods import DEFAULT_METHODS, BenchMethod, parse_method
from bench.padding import add_idle_layers
from bench.record import environment, write_record
from bench.timing import Timing, median_timing, time_host, time_parts
from bench.workloads import Workload, WorkloadName, own_workload, repeated_share
from ssd_jax import (
    Completion,
    Model,
    SamplingParams,
    generate,
    load_model,
    place_model,
    split_cpu,
)
from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.errors import RequestError, SsdJaxError
from ssd_jax.model import demo_folder
from ssd_jax.text.prompt_file import read_prompts

SCHEMA = 1  # of the record; raised when a field changes its meaning
SCREENED_AT_ONCE = 8  # prompts whose plain answers are looked at together
MAX_SCREENED = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request, and how much of its plain answer is copied from it."""

    ids: tuple[int, ...]
    params: SamplingParams
    repeated: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one method did on one batch of prompts; times are medians over the rounds.

    `generate_s` and `stream_s` are None unless the host's time was asked for.
    """

    timing: Timing
    generate_s: float | None
    stream_s: float | None
    completions: tuple[Completion, ...]
    num_differing: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def tokens_per_s(self) -> float:
        """Of decoding alone."""
        return self.num_tokens / self.timing.decode_s


def main() -> int:
    """Measure what the command line asks for; the exit code."""
    args = parse_arguments()
    use_compilation_cache(None)
    try:
        write_record(run(args), args.out)
    except SsdJaxError as error:
        print(f"speculation_speed: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of speculation against plain decoding.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--workload", default="copy-heavy", choices=get_args(WorkloadName))
    source.add_argument("--prompts", type=Path, help="JSON Lines with a `prompt` field")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, metavar="METHOD")
    parser.add_argument("--model", type=Path, help="target's folder (the demo target)")
    parser.add_argument("--draft-model", type=Path, help="draft's folder (the demo draft)")
    parser.add_argument("--num-prompts", type=int, default=8, help="how many to use (8)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens an answer (128)")
    parser.add_argument("--temperature", type=float, help="instead of the workload's own")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded together (1)")
    parser.add_argument("--rounds", type=int, default=3, help="times each batch is timed (3)")
    parser.add_argument(
        "--split", action="store_true", help="one core for the target, one for the draft of ssd"
    )
    parser.add_argument(
        "--idle-layers",
        type=int,
        nargs=2,
        default=(0, 0),
        metavar=("T", "D"),
        help="layers that change nothing, added to target and draft: other costs, same agreement",
    )
    parser.add_argument("--host", action="store_true", help="also: time that the host takes")
    parser.add_argument("--out", type=Path, help="file for the record (stdout)")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, object]:
    """The record of one run."""
    for option in ("num_prompts", "max_tokens", "batch", "rounds"):
        if getattr(args, option) < 1:
            flag = "--" + option.replace("_", "-")
            raise RequestError(f"{flag} must be at least 1, got {getattr(args, option)}.")
    draft_device = split_cpu()[1] if args.split else None
    if args.prompts:
        workload = Workload(name=args.prompts.name, prompts=read_prompts(args.prompts))
    else:
        workload = own_workload(args.workload)
    if args.temperature is not None:
        workload = dataclasses.replace(workload, temperature=args.temperature)
    target = load_model(args.model)
    draft = load_model(args.draft_model or demo_folder("draft"))
    target = add_idle_layers(target, args.idle_layers[0])
    draft = add_idle_layers(draft, args.idle_layers[1])
    names = list(dict.fromkeys(["ar", *args.methods]))
    ssd_draft = place_model(draft, draft_device) if draft_device else draft
    methods = [parse_method(name, draft, ssd_draft) for name in names]
    prompts, num_dropped = screen(target, workload, args.num_prompts, args.max_tokens)
    batches = [tuple(prompts[i : i + args.batch]) for i in range(0, len(prompts), args.batch)]
    batches = [batch for batch in batches if len(batch) == args.batch]
    if not batches:
        raise RequestError(
            f"{workload.name} should fill a batch of {args.batch}, got {len(prompts)} usable "
            "prompts: lower --batch, raise --num-prompts or choose other prompts."
        )
    methods = [method.prepare(target, prompts[0].params, args.batch) for method in methods]
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number, batch in enumerate(batches, start=1):
        print(f"batch {number} of {len(batches)}", file=sys.stderr)
        for name, sample in measure(target, methods, batch, args.rounds, args.host).items():
            samples[name].append(sample)
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "workload": {
            "name": workload.name,
            "prompts": sum(map(len, batches)),
            "dropped_for_too_little_repeated": num_dropped,
            "repeated_share_mean": statistics.mean(prompt.repeated for prompt in prompts),
            "repeated_share_min": min(prompt.repeated for prompt in prompts),
            "prompt_tokens_mean": statistics.mean(len(prompt.ids) for prompt in prompts),
            "temperature": workload.temperature,
            "max_tokens": args.max_tokens,
        },
        "idle_layers_of_target_and_draft": list(args.idle_layers),
        "batch": args.batch,
        "rounds": args.rounds,
        "methods": {
            method.name: summarise(samples[method.name], samples["ar"], method)
            for method in methods
        },
    }


def screen(
    target: Model, workload: Workload, num_prompts: int, max_tokens: int
) -> tuple[list[Prompt], int]:
    """The first prompts that fit and are as repetitive as the workload wants, and how many not.

    Raises:
        RequestError: there are none.
    """
    kept: list[Prompt] = []
    num_dropped = 0
    for chunk in candidates(target, workload, max_tokens):
        answers = generate(target, [ids for ids, _ in chunk], [params for _, params in chunk])
        for (ids, params), answer in zip(chunk, answers, strict=True):
            repeated = repeated_share(ids, answer.token_ids)
            if repeated >= workload.min_repeated:
                kept.append(Prompt(ids=ids, params=params, repeated=repeated))
            else:
                num_dropped += 1
            if len(kept) == num_prompts:
                return kept, num_dropped
    if not kept:
        raise RequestError(
            f"No prompt of {workload.name} fits {target.config.max_context} tokens with "
            f"{max_tokens} for the answer and repeats {workload.min_repeated:.0%} of it: lower "
            "--max-tokens or choose other prompts."
        )
    return kept, num_dropped


def candidates(
    target: Model, workload: Workload, max_tokens: int
) -> Iterator[list[tuple[tuple[int, ...], SamplingParams]]]:
    """Prompts as ids with their options, a few at a time: those that fit the target's context."""
    if target.tokenizer is None:
        raise RequestError("The target must have a tokenizer, got a folder without: add it.")
    encoded = [tuple(target.tokenizer.encode(prompt)) for prompt in workload.prompts]
    fitting = [ids for ids in encoded if len(ids) + max_tokens <= target.config.max_context]
    requests = [
        (
            ids,
            SamplingParams(
                max_tokens=max_tokens, temperature=workload.temperature, seed=seed, ignore_eos=True
            ),
        )
        for seed, ids in enumerate(fitting[:MAX_SCREENED])
    ]
    for start in range(0, len(requests), SCREENED_AT_ONCE):
        yield requests[start : start + SCREENED_AT_ONCE]


def measure(
    target: Model,
    methods: Sequence[BenchMethod],
    batch: Sequence[Prompt],
    rounds: int,
    with_host: bool,
) -> dict[str, Sample]:
    """What every method did on one batch, the methods taking turns."""
    prompts = [prompt.ids for prompt in batch]
    params = [prompt.params for prompt in batch]
    completions = {
        method.name: tuple(generate(target, prompts, params, speculation=method.speculation))
        for method in methods
    }
    parts: dict[str, list[Timing]] = {method.name: [] for method in methods}
    host: dict[str, list[tuple[float, float]]] = {method.name: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            parts[method.name].append(time_parts(target, prompts, params, method.speculation))
        for method in methods if with_host else ():
            host[method.name].append(time_host(target, prompts, params, method.speculation))
    samples = {}
    for name, timings in parts.items():
        pairs = zip(completions["ar"], completions[name], strict=True)
        samples[name] = Sample(
            timing=median_timing(timings),
            generate_s=statistics.median(one for one, _ in host[name]) if with_host else None,
            stream_s=statistics.median(other for _, other in host[name]) if with_host else None,
            completions=completions[name],
            num_differing=sum(one.token_ids != other.token_ids for one, other in pairs),
        )
    return samples


def summarise(
    samples: Sequence[Sample], plain: Sequence[Sample], method: BenchMethod
) -> dict[str, object]:
    """One method's figures over all batches; spreads are [minimum, median, maximum] over them."""
    decode_s = sum(sample.timing.decode_s for sample in samples)
    cpu_s = sum(sample.timing.decode_cpu_s for sample in samples)
    num_tokens = sum(sample.num_tokens for sample in samples)
    plain_cpu_s = sum(sample.timing.decode_cpu_s for sample in plain)
    plain_s = sum(sample.timing.decode_s for sample in plain)
    plain_tokens = sum(sample.num_tokens for sample in plain)
    ratios = [one.tokens_per_s / ar.tokens_per_s for one, ar in zip(samples, plain, strict=True)]
    figures: dict[str, object] = {
        "decode_tokens_per_s": num_tokens / decode_s,
        "decode_ratio_to_ar": num_tokens / decode_s / (plain_tokens / plain_s),
        "decode_ratio_spread": spread(ratios),
        "decode_cpu_ratio_to_ar": num_tokens / cpu_s / (plain_tokens / plain_cpu_s),
        "decode_cpus_busy": cpu_s / decode_s,
        "decode_tokens_per_s_spread": spread([sample.tokens_per_s for sample in samples]),
        "prefill_s_spread": spread([sample.timing.prefill_s for sample in samples]),
        "first_token_s_spread": spread([sample.timing.first_token_s for sample in samples]),
        "outputs_that_differ": sum(sample.num_differing for sample in samples),
        **speculation_figures(samples, num_tokens),
        **host_figures(samples),
    }
    if method.round_times is not None:
        figures["round_times_s"] = method.round_times.seconds
    return figures


def speculation_figures(samples: Sequence[Sample], num_tokens: int) -> dict[str, object]:
    """Tokens a target step, and of each drafter how often it drafted and how much was accepted."""
    counts = [
        completion.speculation
        for sample in samples
        for completion in sample.completions
        if completion.speculation is not None
    ]
    if not counts:
        return {"tokens_per_target_step": 1.0}
    steps = sum(one.target_steps for one in counts)
    drafters = {}
    for name in counts[0].drafters:
        own = [one.drafters[name] for one in counts]
        drafts = sum(one.num_drafts for one in own)
        drafted = sum(one.num_draft_tokens for one in own)
        accepted = sum(one.num_accepted_tokens for one in own)
        drafters[name] = {
            "rounds_with_a_draft": drafts / steps,
            "num_draft_tokens": drafted,
            "num_accepted_tokens": accepted,
            "acceptance_rate": accepted / drafted if drafted else None,
            "accepted_per_draft": accepted / drafts if drafts else None,
        }
    lookups = [one.lookups for one in counts if one.lookups is not None]
    figures = {"tokens_per_target_step": num_tokens / steps, "drafters": drafters}
    if not lookups:
        return figures
    hits, looked_up = (
        [sum(pair) for pair in zip(*(getattr(one, name) for one in lookups), strict=True)]
        for name in ("hits", "lookups")
    )
    return {
        **figures,
        "hit_rate": sum(hits) / max(1, sum(looked_up)),
        "hit_rate_after_miss_and_hit": [
            hit / max(1, number) for hit, number in zip(hits, looked_up, strict=True)
        ],
    }


def host_figures(samples: Sequence[Sample]) -> dict[str, object]:
    """What the host takes, if it was timed.

    `stream_host_share` is the time that looking every few tokens adds, over the time that decoding
    then takes; `request_host_s` what `generate` takes besides prefill and decoding.
    """
    shares, requests = [], []
    for sample in samples:
        if sample.generate_s is None or sample.stream_s is None:
            return {}
        added = sample.stream_s - sample.generate_s
        shares.append(added / (sample.timing.decode_s + added))
        parts = sample.timing.prefill_s + sample.timing.decode_s
        requests.append(sample.generate_s - parts)
    return {"stream_host_share_spread": spread(shares), "request_host_s_spread": spread(requests)}


def spread(values: Sequence[float]) -> list[float]:
    """Minimum, median and maximum."""
    return [min(values), statistics.median(values), max(values)]


if __name__ == "__main__":
    sys.exit(main())
