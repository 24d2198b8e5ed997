"""Files that the simulator reads: times of the parts of a round, speeds, outcomes of a run.

Parts come as the TOML that `ssd-jax tune` writes, or as JSON:

    {"schema": 1, "source": "...", "batch": 1, "parts": {...}, "methods": {...}}

`parts` has the fields of `Times` (`ssd_jax/tuning/speed.py`) and of `MeasuredCosts`, `methods` what
`bench/speculation_speed.py` records of each: `decode_tokens_per_s`, `tokens_per_target_step` and
`hit_rate`. A trace is JSON too:

    {"schema": 1, "fan_out": {"after_hit": [3, 2], "after_miss": [3, 2]}, "fallback": "neural",
     "foretold": true, "speculation": [...]}

with one `Completion.speculation` of SSD an answer, as `dataclasses.asdict` makes it; `foretold`
(true if absent) as in `Behaviour` of the same file. The wider its fan-out, the more can be told.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bench.simulate.costs import MeasuredCosts
from bench.simulate.methods import SimulatedMethod
from bench.simulate.outcomes import OutcomeLaws, counted_law
from ssd_jax.engine.counts import LookupCounts
from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError, SsdJaxError
from ssd_jax.fan_out import FanOut
from ssd_jax.tuning.measuring import read_outcomes
from ssd_jax.tuning.speed import Behaviour, Outcomes, Times
from ssd_jax.tuning.tuned_file import read_tuned

SCHEMA = 1
OWN_MACHINE = Path(__file__).parent / "xeon.json"
_TIMES = ("verify_s", "lookup_s", "neural_s", "ngram_s", "prepare_s")
_REST = ("draft_s", "hop_s", "dispatch_s", "overlap")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpeed:
    """What one method was measured to reach; the rest is None where it means nothing."""

    tokens_per_s: float
    tokens_per_round: float | None
    hit_rate: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Outcomes that SSD counted, and its fallback at that time."""

    behaviour: Behaviour
    fallback: Fallback


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartsRecord:
    """Times of one machine, and what came out there if that is known.

    Attributes:
        trace: of the longest drafts, where the file has it (tuned files do).
    """

    source: str
    batch: int
    costs: MeasuredCosts
    speeds: dict[str, MeasuredSpeed]
    trace: Trace | None


def read_parts(path: Path) -> PartsRecord:
    """The times of a parts record or of a tuned file.

    Raises:
        SsdJaxError: the file is not there or not such a file.
    """
    if path.suffix == ".toml":
        return _from_tuned(path)
    content = _read_json(path)
    parts = content.get("parts")
    if not isinstance(parts, dict):
        raise RequestError(f"{path} should have an object `parts` with the times, got {parts!r}.")
    missing = [name for name in (*_TIMES, "draft_s") if name not in parts]
    unknown = sorted(set(parts) - {*_TIMES, *_REST})
    if missing or unknown:
        raise RequestError(
            f"The parts of {path} should be {', '.join((*_TIMES, *_REST))}; missing are "
            f"{', '.join(missing) or 'none'}, unknown are {', '.join(unknown) or 'none'}."
        )
    numbers = {name: _numbers(path, name, value) for name, value in parts.items()}
    batch = content.get("batch", 1)
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise RequestError(f"`batch` of {path} should be a whole number from 1 on, got {batch!r}.")
    try:
        times = Times(**{name: numbers[name] for name in _TIMES})
        rest = {name: numbers[name] for name in _REST if name in numbers}
        if not isinstance(rest["draft_s"], tuple) or len(rest["draft_s"]) != 2:
            raise RequestError(f"draft_s should be two numbers, got {rest['draft_s']}.")
        costs = MeasuredCosts(times=times, **rest)
    except (SsdJaxError, TypeError) as error:
        raise RequestError(f"The parts of {path} cannot be used: {error}") from error
    return PartsRecord(
        source=str(content.get("source", path)),
        batch=batch,
        costs=costs,
        speeds=_speeds(path, content),
        trace=None,
    )


def read_speeds(path: Path) -> dict[str, MeasuredSpeed]:
    """The measured methods of a record of `bench/speculation_speed.py`, by name.

    Raises:
        RequestError: the file is not there or not such a record.
    """
    speeds = _speeds(path, _read_json(path))
    if not speeds:
        raise RequestError(f"{path} should tell speeds of `methods`, got none: name a record.")
    return speeds


def read_trace(path: Path) -> Trace:
    """The outcomes that answers of SSD counted.

    With the neural fallback the outcomes of prepared drafts and of later ones are put together: one
    model drafts both. That drafts after a miss fare worse tells of the text at which that fan-out
    misses, and would mislead about another fan-out.

    Raises:
        RequestError: the file is not there or not such a record.
    """
    content = _read_json(path)
    if content.get("fallback") not in get_args(Fallback):
        raise RequestError(
            f"`fallback` of {path} should be neural or ngram, got {content.get('fallback')!r}."
        )
    fallback: Fallback = "ngram" if content["fallback"] == "ngram" else "neural"
    try:
        lists = content["fan_out"]
        fan_out = FanOut(after_hit=tuple(lists["after_hit"]), after_miss=tuple(lists["after_miss"]))
        counts = [
            LookupCounts(**{name: _tuples(value) for name, value in one["lookups"].items()})
            for one in content["speculation"]
        ]
        after_miss, after_hit = (
            read_outcomes(counts, fan_out, after_hit=kind) for kind in (False, True)
        )
    except SsdJaxError as error:
        raise RequestError(f"The trace {path} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RequestError(
            f"The trace {path} should have fan_out and, of each answer of SSD, speculation with "
            f"its lookups ({type(error).__name__}: {error}): write it from Completion.speculation."
        ) from error
    foretold = bool(content.get("foretold", True))
    if fallback == "neural":
        after_miss = after_hit = _together(after_miss, after_hit)
    return Trace(
        behaviour=Behaviour(
            after_hit=after_hit,
            after_miss=after_miss,
            foretold=(foretold, foretold and fallback == "neural"),
        ),
        fallback=fallback,
    )


def trace_laws(trace: Trace, method: SimulatedMethod) -> OutcomeLaws:
    """How the drafts of a method come out, by a trace of drafts at least as long.

    Raises:
        RequestError: the trace's drafts were shorter, or another fallback's.
    """
    longest = len(trace.behaviour.after_hit.accepted) - 1
    if method.draft_len > longest:
        raise RequestError(
            f"The trace is of drafts of {longest} tokens, got a method with {method.draft_len}: "
            "lower its k, or record longer drafts."
        )
    if method.fan_out is not None and method.fallback != trace.fallback:
        raise RequestError(
            f"The trace was recorded with the {trace.fallback} fallback, got a method with "
            f"{method.fallback}: record one with that."
        )
    own = trace.behaviour.shortened(method.draft_len)
    hits = own.after_hit if own.after_hit.accepted.sum() else own.after_miss
    misses = own.after_miss if own.after_miss.accepted.sum() else own.after_hit
    return OutcomeLaws(after_hit=counted_law(hits), after_miss=counted_law(misses))


def _together(one: Outcomes, other: Outcomes) -> Outcomes:
    """The counts of both, of which one may have been given fewer guesses."""
    width = max(one.hits_by_rank.shape[1], other.hits_by_rank.shape[1])
    hits = [
        np.pad(outcomes.hits_by_rank, ((0, 0), (0, width - outcomes.hits_by_rank.shape[1])))
        for outcomes in (one, other)
    ]
    return Outcomes(
        accepted=one.accepted + other.accepted,
        hits_by_rank=hits[0] + hits[1],
        lookups=one.lookups + other.lookups,
    )


def _from_tuned(path: Path) -> PartsRecord:
    """Times and outcomes of a tuned file. Guesses are told for all accepted lengths together."""
    tuned = read_tuned(path)
    figures = tuned.outcomes

    def outcomes(accepted: tuple[int, ...], guesses: tuple[int, ...]) -> Outcomes:
        judged = np.array(accepted)
        shares = judged / max(1, judged.sum())
        return Outcomes(
            accepted=judged,
            hits_by_rank=np.outer(shares, guesses),
            lookups=int(judged.sum()),
        )

    return PartsRecord(
        source=str(path),
        batch=tuned.measured.batch_size,
        costs=MeasuredCosts(times=tuned.times, draft_s=tuned.times.neural_s),
        speeds={},
        trace=Trace(
            behaviour=Behaviour(
                after_hit=outcomes(figures.accepted_after_hit, figures.guesses_after_hit),
                after_miss=outcomes(figures.accepted_after_miss, figures.guesses_after_miss),
                foretold=(False, False),
            ),
            fallback=tuned.choice.setting.fallback,
        ),
    )


def _speeds(path: Path, content: Mapping[str, Any]) -> dict[str, MeasuredSpeed]:
    methods = content.get("methods", {})
    if not isinstance(methods, dict):
        raise RequestError(f"`methods` of {path} should be an object, got {methods!r}.")
    speeds = {}
    for name, figures in methods.items():
        fields = figures if isinstance(figures, dict) else {}
        values = {
            key: fields.get(key)
            for key in ("decode_tokens_per_s", "tokens_per_target_step", "hit_rate")
        }
        numbers = {
            key: None if value is None else _numbers(path, f"{name}.{key}", value)
            for key, value in values.items()
        }
        speed = numbers["decode_tokens_per_s"]
        if not isinstance(speed, float) or speed <= 0:
            raise RequestError(
                f"{path} should tell decode_tokens_per_s above 0 of {name}, got {speed!r}."
            )
        speeds[name] = MeasuredSpeed(
            tokens_per_s=speed,
            tokens_per_round=numbers["tokens_per_target_step"],
            hit_rate=numbers["hit_rate"],
        )
    return speeds


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read ({error.strerror}): name a file that can."
        ) from error
    except ValueError as error:
        raise RequestError(f"{path} should be JSON, but it is not ({error}).") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} should hold a JSON object, got {type(content).__name__}.")
    schema = content.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise RequestError(
            f"{path} should have schema {SCHEMA}, got {schema!r}: make it with this version."
        )
    return content


def _numbers(path: Path, name: str, value: Any) -> Any:  # noqa: ANN401 (a number or several)
    """A float, or a tuple of them for a list."""
    if isinstance(value, list):
        return tuple(_numbers(path, name, one) for one in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise RequestError(f"{name} of {path} should be finite numbers, got {value!r}.")
    return float(value)


def _tuples(value: Any) -> Any:  # noqa: ANN401 (nested lists of whole numbers)
    return tuple(map(_tuples, value)) if isinstance(value, list) else int(value)
