"""Files that the simulator reads: times of the parts of a round, and measured speeds.

Parts come as the TOML that `ssd-jax tune` writes, or as JSON:

    {"schema": 1, "source": "...", "batch": 1, "parts": {...}, "cells": [...]}

`parts` has the fields of `Times` (`ssd_jax/tuning/speed.py`) and of `MeasuredCosts`. `cells` may be
left out; they are as in records of `ssd-jax bench run` (`bench/RECORDS.md`), of which `workload`
and of each method `decode_tokens_per_s`, `tokens_per_target_step` and `hit_rate` are read.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import read_record, require_run
from bench.simulate.costs import MeasuredCosts
from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError, SsdJaxError
from ssd_jax.tuning.speed import Behaviour, Outcomes, Times
from ssd_jax.tuning.tuned_file import read_tuned

SCHEMA = 1
OWN_MACHINE = tuple(Path(__file__).parent / name for name in ("xeon.json", "xeon_first.json"))
_TIMES = ("verify_s", "lookup_s", "neural_s", "ngram_s", "prepare_s")
_REST = ("draft_s", "hop_s", "dispatch_s", "host_s", "overlap")

type Cells = dict[str, dict[str, MeasuredSpeed]]


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
        cells: measured methods by workload.
        trace: of the longest drafts, where the file has it (tuned files do).
    """

    source: str
    batch: int
    costs: MeasuredCosts
    cells: Cells
    trace: Trace | None


def read_parts(path: Path) -> PartsRecord:
    """The times of a parts record or of a tuned file.

    Raises:
        SsdJaxError: the file is not there or not such a file.
    """
    if path.suffix == ".toml":
        return _from_tuned(path)
    content = read_json(path)
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
        cells=_cells(path, content, batch),
        trace=None,
    )


def read_cells(path: Path, batch: int) -> Cells:
    """The methods that `ssd-jax bench run` measured with so many rows, by workload.

    Raises:
        SsdJaxError: the file is not there, not such a record or without such rows.
    """
    record = read_record(path)
    require_run(record, path)
    cells = _cells(path, record, batch)
    if not cells:
        raise RequestError(
            f"{path} should tell speeds of {batch} rows, as the times are of: measure them."
        )
    return cells


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
        cells={},
        trace=Trace(
            behaviour=Behaviour(
                after_hit=outcomes(figures.accepted_after_hit, figures.guesses_after_hit),
                after_miss=outcomes(figures.accepted_after_miss, figures.guesses_after_miss),
                foretold=(False, False),
            ),
            fallback=tuned.choice.setting.fallback,
        ),
    )


def _cells(path: Path, content: Mapping[str, Any], batch: int) -> Cells:
    cells = content.get("cells", [])
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise RequestError(f"`cells` of {path} should be a list of objects, got {cells!r}.")
    named: Cells = {}
    for cell in cells:
        methods = cell.get("methods", {})
        if not isinstance(methods, dict):
            raise RequestError(f"`methods` of {path} should be an object, got {methods!r}.")
        if cell.get("batch", batch) != batch or not methods:
            continue
        temperature = f", T {cell['temperature']:g}" if "temperature" in cell else ""
        named[f"{cell.get('workload')}{temperature}"] = {
            name: _speed(path, name, figures) for name, figures in methods.items()
        }
    return named


def _speed(path: Path, name: str, figures: object) -> MeasuredSpeed:
    fields = figures if isinstance(figures, dict) else {}
    keys = ("decode_tokens_per_s", "tokens_per_target_step", "hit_rate")
    speed, tokens, hit_rate = (
        None if fields.get(key) is None else _numbers(path, f"{name}.{key}", fields[key])
        for key in keys
    )
    if not isinstance(speed, float) or speed <= 0:
        raise RequestError(
            f"{path} should tell decode_tokens_per_s above 0 of {name}, got {speed!r}."
        )
    return MeasuredSpeed(tokens_per_s=speed, tokens_per_round=tokens, hit_rate=hit_rate)


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of the simulator's own files.

    Raises:
        RequestError: there is none of this version.
    """
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
