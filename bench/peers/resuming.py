"""The record of a comparison: what was planned, and how answers in it are taken up again."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.compare import Results, Turns, summarise
from bench.peers.contenders import Contender, parse_contender
from bench.peers.protocol import Answer
from bench.record import begin_or_resume, refuse_other

SCHEMA = 2  # of the record; raised when a field changes its meaning

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared, fixed before it begins.

    Attributes:
        model: the target's folder, "demo" for the bundled one, "random" for random weights;
            `draft_model` likewise.
        prompts: the file's name, or "random ids".
        prompts_sha256: of the ids, to notice that file or tokenizer has changed.
        server: address of the server that takes part, None without one.
    """

    model: str
    draft_model: str | None
    contenders: tuple[str, ...]
    prompts: str
    prompts_sha256: str
    num_prompts: int
    max_tokens: int
    rounds: int
    dtype: str
    threads: int
    server: str | None


def fingerprint(prompts: Sequence[Sequence[int]]) -> str:
    """A hash of the prompts' ids."""
    return hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()[:16]


def open_record(plan: Plan, path: Path | None) -> Record:
    """The record to write into: the one in the file if it is of the same plan, else a new one.

    Raises:
        RequestError: the file holds something else, or measurements of another plan, commit or
            machine.
    """
    record = begin_or_resume("peers", SCHEMA, dataclasses.asdict(plan), path)
    if not record.get("units"):  # nobody has answered: who was absent may be there now
        record.update(versions={}, skipped={}, failed={}, units=[])
    return record


def refuse_other_versions(record: Record, versions: Mapping[str, Any], path: Path | None) -> None:
    """Refuse to go on with other versions of the engines than those that began.

    Raises:
        RequestError: naming the engine.
    """
    for name, before in record["versions"].items():
        if path is not None and name in versions:
            refuse_other(path, f"{name} of versions", before, versions[name])


def read_results(record: Record, contenders: Sequence[Contender]) -> Results:
    """The answers that a record holds, of contenders that neither failed nor were skipped."""
    failed = {parse_contender(name): reason for name, reason in record["failed"].items()}
    turns = {
        contender: tuple(_read_turns(unit["turns"][contender.name]) for unit in record["units"])
        for contender in contenders
        if contender not in failed and contender.peer not in record["skipped"]
    }
    return Results(turns=turns, failed=failed)


def add_results(
    record: Record,
    results: Results,
    prompts: Sequence[Sequence[int]],
    decode_text: Callable[[Sequence[int]], str] | None,
) -> None:
    """Put all answers so far into the record, and the figures that follow from them."""
    record["units"] = [
        {
            "prompt_tokens": len(prompts[place]),
            "turns": {
                contender.name: dataclasses.asdict(turns[place])
                for contender, turns in results.turns.items()
            },
        }
        for place in range(results.num_prompts)
    ]
    record.update(summarise(results, decode_text))
    record["complete"] = results.num_prompts == len(prompts)


def _read_turns(entry: Mapping[str, Any]) -> Turns:
    return Turns(
        output=Answer(**entry["output"]),
        timed=tuple(Answer(**answer) for answer in entry["timed"]),
    )
