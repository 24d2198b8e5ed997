"""The record of a run as JSON, and as tables in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.first_light.cases import STAGES
from bench.markdown import table
from ssd_jax.json_text import to_json
from ssd_jax.whole_file import write_whole

SCHEMA = 1
JSON_NAME, TABLE_NAME = "first_light.json", "first_light.md"

type Result = dict[str, Any]


def write(folder: Path, results: Sequence[Result], *, dry_run: bool, seconds: float) -> None:
    """Both files, replaced in one go."""
    record = {"schema": SCHEMA, "dry_run": dry_run, "seconds": seconds, "cases": list(results)}
    write_whole(folder / JSON_NAME, (to_json(record, indent=1) + "\n").encode())
    write_whole(folder / TABLE_NAME, as_markdown(results).encode())


def as_markdown(results: Iterable[Result]) -> str:
    """A table a stage: rows that were told, and cases that did not come to their end.

    Rows marked as details are left out unless they are wrong.
    """
    results = list(results)
    parts = []
    for stage, question in STAGES.items():
        own = [result for result in results if result["stage"] == stage]
        if not own:
            continue
        lines = [line for result in own for line in _lines(result)]
        head = ("case", "what", "found", "")
        parts.append(f"### {stage}: {question}\n\n{table(head, lines)}\n")
    return "\n".join(parts)


def _lines(result: Result) -> list[list[str]]:
    lines = [
        [result["case"], row["what"], row["figure"], "" if row["ok"] else "**wrong**"]
        for row in result["rows"]
        if not (row["ok"] and row.get("detail"))
    ]
    if result["status"] not in ("passed", "wrong"):
        last = [line.strip() for line in result["log"].splitlines() if line.strip()]
        reason = last[-1][:200].replace("|", "\\|") if last else ""
        lines.append([result["case"], "", reason, f"**{result['status']}**"])
    return lines
