"""Values, tokens and speeds on the first GPU that is at hand, in the order of their value.

    python -m bench.first_light --out first_light --minutes 10

Every case is a process with a time limit, and each result is on disk the moment it is known.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.first_light import report
from bench.first_light.cases import STAGES, all_cases
from bench.first_light.processes import run_cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 if every case passed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_light", description=main.__doc__, epilog=_stages()
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "first_light"),
        help=f"folder for {report.JSON_NAME}, {report.TABLE_NAME} and pictures (default: $OUT, or "
        "first_light)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="stages"
    )
    parser.add_argument(
        "--match", type=re.compile, metavar="REGEX", help='only cases whose "stage: name" has it'
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="what has not begun by then is not run"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="cases beside each other where no times are taken"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on a CPU, kernels in the interpreter"
    )
    given = parser.parse_args(arguments)
    if given.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {given.minutes}")
    if given.workers < 0:
        parser.error(f"--workers must be at least 1, or 0 to choose, got {given.workers}")
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ["FIRST_LIGHT_OUT"] = str(given.out.resolve())
    started = time.monotonic()
    results: list[dict[str, Any]] = []

    def done(result: dict[str, Any]) -> None:
        results.append(result)
        seconds = round(time.monotonic() - started, 1)
        report.write(given.out, results, dry_run=given.dry_run, seconds=seconds)
        wrong = sum(not row["ok"] for row in result["rows"])
        rows = f"{len(result['rows'])} rows" + (f", {wrong} wrong" if wrong else "")
        print(
            f"{seconds:6.1f} s  {result['status']:9} {result['stage']}: {result['case']} ({rows})"
        )
        sys.stdout.flush()

    cases = [case for case in all_cases(dry_run=given.dry_run) if case.stage in given.only]
    if given.match is not None:
        cases = [case for case in cases if given.match.search(f"{case.stage}: {case.name}")]
    if not cases:
        parser.error("no case is left to run: name other stages or another --match")
    run_cases(
        cases,
        dry_run=given.dry_run,
        workers=given.workers or max(1, min(8, (os.cpu_count() or 2) // 2)),
        deadline=started + 60 * given.minutes,
        done=done,
    )
    print()
    print(report.as_markdown(results))
    return 0 if all(result["status"] == "passed" for result in results) else 1


def _stages() -> str:
    return "Stages: " + "; ".join(f"{name} ({what})" for name, what in STAGES.items()) + "."


if __name__ == "__main__":
    sys.exit(main())
