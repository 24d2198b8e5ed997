"""Cases in processes of their own: what hangs is killed, and what was told before is kept."""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.first_light.cases import Case

_KEPT_LOG = 3000  # characters of what a case that failed said last
_ROOT = Path(__file__).parents[2]
# Blocked barrier waits of the interpreter each hold a thread; with fewer it starves.
_INTERPRETER_THREADS = "16"

type Result = dict[str, Any]


def run_cases(
    cases: Sequence[Case],
    *,
    dry_run: bool,
    workers: int,
    deadline: float,
    done: Callable[[Result], None],
) -> None:
    """Run cases in order, those that take no times beside each other; `done` gets each result.

    `deadline` is a time of `time.monotonic`; what cannot begin before it is recorded as not run.
    """
    waiting: list[Case] = []

    def run_waiting() -> None:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for result in concurrent.futures.as_completed(
                [
                    pool.submit(run_case, case, dry_run=dry_run, deadline=deadline)
                    for case in waiting
                ]
            ):
                done(result.result())
        waiting.clear()

    for case in cases:
        if waiting and (case.alone or case.stage != waiting[0].stage):
            run_waiting()
        if case.alone:
            done(run_case(case, dry_run=dry_run, deadline=deadline))
        else:
            waiting.append(case)
    run_waiting()


def run_case(case: Case, *, dry_run: bool, deadline: float) -> Result:
    """What became of a case: "passed", "wrong", "failed", "timed out" or "not run", and its rows.

    It is "wrong" if a row says so. Rows told before a failure are kept.
    """
    result: Result = {"stage": case.stage, "case": case.name, "rows": [], "log": ""}
    left = deadline - time.monotonic()
    if left < 5:
        return result | {"status": "not run", "log": "the script's time was up"}
    if case.sanitizer is not None and shutil.which("compute-sanitizer") is None:
        return result | {"status": "not run", "log": "compute-sanitizer is not on this machine"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="first-light-") as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        rows.touch()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                _command(case, rows, dry_run=dry_run),
                env=_environment(case, dry_run=dry_run),
                cwd=_ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(min(case.limit_s, left))
                status = "passed" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timed out"
            finally:
                _kill(process)
        result["rows"] = _read_rows(rows)
        said = log.read_text(errors="replace")
    if status == "passed" and not all(row["ok"] for row in result["rows"]):
        status = "wrong"
    if status == "passed" and case.sanitizer is None:
        said = ""
    return result | {
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "log": said[-_KEPT_LOG:],
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children; does nothing once they have ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _command(case: Case, rows: Path, *, dry_run: bool) -> list[str]:
    command = [sys.executable, "-m", "bench.first_light.child"]
    command += [case.function, json.dumps(case.options), str(rows)]
    command += ["--dry-run"] if dry_run else []
    if case.sanitizer is not None:
        watch = ["compute-sanitizer", "--tool", case.sanitizer, "--error-exitcode", "9"]
        command = [*watch, *command]
    return command


def _environment(case: Case, *, dry_run: bool) -> dict[str, str]:
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(
        [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    # Several processes share the device's memory.
    found.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if dry_run:
        found["JAX_PLATFORMS"] = "cpu"
        if case.interpreted:
            found["NPROC"] = _INTERPRETER_THREADS
    return found


def _read_rows(path: Path) -> list[Result]:
    """The rows that were told whole; a process that is killed may leave half of one."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
