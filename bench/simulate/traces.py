"""Traces: outcomes that SSD counted while it decoded, as laws for the simulator.

A trace is a record of `ssd-jax bench run` (all its cells, of one method), or JSON of its own:

    {"schema": 1, "fan_out": {"after_hit": [3, 2], "after_miss": [3, 2]}, "fallback": "neural",
     "foretold": true, "speculation": [...]}

with one `Completion.speculation` of SSD an answer, as `dataclasses.asdict` makes it; `foretold`
(true if absent) as in `Behaviour` (`ssd_jax/tuning/speed.py`). The wider its fan-out, the more can
be told.
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np

from bench.record import read_record, require_run
from bench.simulate.methods import SimulatedMethod, parse_simulated
from bench.simulate.outcomes import OutcomeLaws, counted_law
from bench.simulate.records import Trace, read_json
from ssd_jax.engine.counts import LookupCounts
from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError, SsdJaxError
from ssd_jax.fan_out import FanOut
from ssd_jax.tuning.measuring import read_outcomes
from ssd_jax.tuning.speed import Behaviour, Outcomes


def read_trace(path: Path, method: str | None = None) -> Trace:
    """The outcomes that answers of SSD counted; `method` says of which, in a record of `bench run`.

    Raises:
        RequestError: the file is not there or not such a record, or a method that is not in it.
    """
    record = read_record(path)
    if record.get("kind") == "run":
        require_run(record, path)
        return _from_run(path, record, method)
    content = read_json(path)
    if content.get("fallback") not in get_args(Fallback):
        raise RequestError(
            f"`fallback` of {path} should be neural or ngram, got {content.get('fallback')!r}."
        )
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
    fallback: Fallback = "ngram" if content["fallback"] == "ngram" else "neural"
    return _trace(after_miss, after_hit, fallback, foretold=bool(content.get("foretold", True)))


def _from_run(path: Path, record: dict[str, Any], method: str | None) -> Trace:
    """All cells of one method, whose drafts' first guesses are taken for what they draft."""
    found = [
        cell["methods"][method]["outcomes"]
        for cell in record["cells"]
        if "outcomes" in cell["methods"].get(method, {})
    ]
    if method is None or not found:
        names = sorted(
            {
                name
                for cell in record["cells"]
                for name, figures in cell["methods"].items()
                if "outcomes" in figures
            }
        )
        raise RequestError(
            f"--trace-method should name a method of ssd in {path} ({', '.join(names) or 'none'}), "
            f"got {method!r}."
        )
    after_miss, after_hit = (
        Outcomes(
            accepted=np.sum([one["accepted"][kind] for one in found], axis=0),
            hits_by_rank=np.sum([one["hits_by_rank"][kind] for one in found], axis=0),
            lookups=sum(one["lookups"][kind] for one in found),
        )
        for kind in (0, 1)
    )
    return _trace(after_miss, after_hit, parse_simulated(method).fallback, foretold=True)


def _trace(
    after_miss: Outcomes, after_hit: Outcomes, fallback: Fallback, *, foretold: bool
) -> Trace:
    """With the neural fallback the outcomes of prepared drafts and of later ones together.

    One model drafts both. That drafts after a miss fare worse tells of the text at which that
    fan-out misses, and would mislead about another fan-out.
    """
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


def _tuples(value: Any) -> Any:  # noqa: ANN401 (nested lists of whole numbers)
    return tuple(map(_tuples, value)) if isinstance(value, list) else int(value)
