"""Measuring every method on one batch of prompts: plain numbers, ready for the record."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from bench.methods import BenchMethod
from bench.peak_memory import forget_peak, peak_bytes
from bench.screening import Prompt
from bench.timing import time_deliveries, time_host, time_parts
from bench.workloads import repeated_share
from ssd_jax import SSD, Completion, Model, generate
from ssd_jax.cli.compile_clock import CompileClock
from ssd_jax.timeline.rounds import Interval, Round, record_rounds, summarize
from ssd_jax.tuning.measuring import read_outcomes

MOST_ROUNDS = 48  # of a timeline that are kept
PASSES_BESIDES_ROUNDS = 2  # the one that warms up, and the one that is looked at step by step

type Tell = Callable[[str], None]


def measure_unit(
    target: Model,
    methods: Sequence[BenchMethod],
    batch: Sequence[Prompt],
    *,
    rounds: int,
    with_host: bool,
    tell: Tell,
) -> dict[str, Any]:
    """What every method did on one batch of prompts; times are lists, one entry a round.

    Every method answers twice unmeasured, which compiles its programs and gives the outputs that
    are compared with the first method's. Then the methods take turns, `rounds` times. `tell` is
    called with the method's name before each pass.
    """
    prompts = [prompt.ids for prompt in batch]
    params = [prompt.params for prompt in batch]
    samples: dict[str, dict[str, Any]] = {}
    plain: list[Completion] = []
    for method in methods:
        tell(method.name)
        forget_peak()
        with CompileClock() as clock:
            answers = generate(target, prompts, params, speculation=method.speculation)
            time_parts(target, prompts, params, method.speculation)  # may compile more
        plain = plain or answers
        samples[method.name] = {
            "compile_s": clock.seconds,
            "peak_bytes": peak_bytes(),
            "num_tokens": sum(len(answer.token_ids) for answer in answers),
            "num_differing": sum(
                one.token_ids != other.token_ids for one, other in zip(plain, answers, strict=True)
            ),
            "speculation": _counts(answers, method),
            "prefill_s": [],
            "first_step_s": [],
            "decode_s": [],
            "decode_cpu_s": [],
        }
    for _, method in itertools.product(range(rounds), methods):
        tell(method.name)
        own = samples[method.name]
        timing = time_parts(target, prompts, params, method.speculation)
        for part, seconds in dataclasses.asdict(timing).items():
            own[part].append(seconds)
        if with_host:
            whole, streamed = time_host(target, prompts, params, method.speculation)
            own.setdefault("generate_s", []).append(whole)
            own.setdefault("stream_s", []).append(streamed)
    for method in methods:
        tell(method.name)
        samples[method.name]["deliveries"] = time_deliveries(
            target, prompts, params, method.speculation
        )
    return {
        "prompt_tokens": [len(ids) for ids in prompts],
        "repeated_share": [
            repeated_share(ids, answer.token_ids)
            for ids, answer in zip(prompts, plain, strict=True)
        ],
        "methods": samples,
    }


def record_timeline(target: Model, ssd: SSD, batch: Sequence[Prompt]) -> dict[str, Any]:
    """When the programs of SSD's rounds ran on this batch, free and in lockstep, and the summary.

    The options are those of the first prompt.
    """
    prompts, params = [prompt.ids for prompt in batch], batch[0].params
    free, lockstep = (
        record_rounds(target, ssd, prompts, params, lockstep=lockstep) for lockstep in (False, True)
    )
    summary = summarize(free, lockstep)
    return {
        "summary": None if summary is None else dataclasses.asdict(summary),
        "rounds": [_round(one) for one in free[:MOST_ROUNDS]],
    }


def _round(one: Round) -> dict[str, Any]:
    def span(interval: Interval) -> tuple[float, float]:
        return interval.start, interval.end

    return {
        "propose": span(one.propose),
        "verify": span(one.verify),
        "prepare": span(one.prepare),
        "is_hit": one.is_hit,
        "accepted": [row.num_accepted for row in one.rows],
    }


def _counts(answers: Sequence[Completion], method: BenchMethod) -> dict[str, Any] | None:
    """What speculation did, all rows together; pairs are (after a miss, after a hit)."""
    counts = [answer.speculation for answer in answers if answer.speculation is not None]
    if not counts:
        return None
    found: dict[str, Any] = {
        "target_steps": sum(one.target_steps for one in counts),
        "drafters": {
            name: _added([dataclasses.asdict(one.drafters[name]) for one in counts])
            for name in counts[0].drafters
        },
        "lookups": None,
    }
    lookups = [one.lookups for one in counts if one.lookups is not None]
    if lookups and isinstance(method.speculation, SSD):
        outcomes = [
            read_outcomes(lookups, method.speculation.both_fan_outs, after_hit=after_hit)
            for after_hit in (False, True)
        ]
        found["lookups"] = {
            "lookups": [int(one.lookups) for one in outcomes],
            "hits": [sum(one.hits[kind] for one in lookups) for kind in (0, 1)],
            "accepted": [one.accepted.tolist() for one in outcomes],
            "hits_by_rank": [one.hits_by_rank.tolist() for one in outcomes],
        }
    return found


def _added(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums of numbers and of tuples of numbers, key by key."""
    return {
        name: [sum(column) for column in zip(*(one[name] for one in counts), strict=True)]
        if isinstance(value, tuple)
        else sum(one[name] for one in counts)
        for name, value in counts[0].items()
    }
