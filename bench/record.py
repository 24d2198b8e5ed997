"""The record of a run: where it ran, writing it so that no half-written file is left, reading it.

What is in a record is described in bench/RECORDS.md.
"""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from ssd_jax.errors import ConfigError, RequestError
from ssd_jax.json_text import to_json
from ssd_jax.whole_file import write_whole

SCHEMA = 2  # of the records of `ssd-jax bench run`; raised when a field changes its meaning
_SAME_MACHINE = ("commit", "jax", "platform", "device_kind", "cpus")


def environment() -> dict[str, object]:
    """What a figure depends on besides the code's options."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": len(jax.devices()),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def write_record(record: dict[str, object], path: Path | None) -> None:
    """The record as JSON in a file, which is replaced in one go, or on stdout.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = to_json(record, indent=2) + "\n"
    if path is None:
        print(text, end="")
        return
    write_whole(path, text.encode())


def save_progress(record: dict[str, object], path: Path | None) -> None:
    """Write an incomplete record, if there is a file for it.

    Raises:
        ConfigError: the file cannot be written; it then holds what it held before.
    """
    if path is None:
        return
    try:
        write_record(record, path)
    except ConfigError as error:
        raise ConfigError(
            f"{error} What was measured before is in it; once it can be written, the same command "
            "goes on from there."
        ) from error


def begin_or_resume(
    kind: str, schema: int, planned: dict[str, Any], path: Path | None
) -> dict[str, Any]:
    """The record to write into: the one in the file if it is of the same plan, else a new one.

    `planned` is what the record shall say of the plan.

    Raises:
        RequestError: the file holds something else, or measurements of another plan, commit or
            machine.
    """
    planned, here = _as_json(planned), environment()
    if path is None or not path.exists():
        return {
            "kind": kind,
            "schema": schema,
            "complete": False,
            "environment": here,
            "sittings": [here["date"]],
            "plan": planned,
        }
    record = read_record(path)
    require_kind(record, path, kind, schema)
    for what, before, now in (
        *((name, record["plan"].get(name), planned[name]) for name in planned),
        *((name, record["environment"].get(name), here[name]) for name in _SAME_MACHINE),
    ):
        refuse_other(path, what, before, now)
    if not record["complete"]:
        record["sittings"].append(here["date"])
    return record


def refuse_other(path: Path, what: str, before: object, now: object) -> None:
    """Refuse to go on with a record under other conditions.

    Raises:
        RequestError: naming what is not as it was.
    """
    if before != now:
        raise RequestError(
            f"{path} holds a run with {what} {before!r}, which cannot go on with {now!r}: give "
            "--out another file, or delete this one."
        )


def read_record(path: Path) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        RequestError: the file cannot be read, or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"A record should be a JSON file that `ssd-jax bench` wrote, but {path} cannot be read "
            f"as one ({error}): name another file."
        ) from error
    if not isinstance(record, dict) or "schema" not in record:
        raise RequestError(
            f"A record should be a JSON object with a schema, but {path} is not: name another file."
        )
    return record


def require_run(record: dict[str, Any], path: Path) -> None:
    """Refuse what is not a record of `bench run` in the present schema.

    Raises:
        RequestError: naming what it is instead.
    """
    require_kind(record, path, "run", SCHEMA)


def require_kind(record: dict[str, Any], path: Path, kind: str, schema: int) -> None:
    """Refuse what is not a record of `bench KIND` in that schema.

    Raises:
        RequestError: naming what it is instead.
    """
    if record.get("kind") != kind:
        raise RequestError(
            f"{path} should be a record of `ssd-jax bench {kind}`, got one of kind "
            f"{record.get('kind')!r}: name another file."
        )
    if record["schema"] != schema:
        raise RequestError(
            f"{path} should have schema {schema}, got {record['schema']!r}: it was written by "
            "another version of the benchmark, so measure again into another file."
        )


def _as_json(value: Any) -> Any:  # noqa: ANN401
    """The value as it comes back from a JSON file."""
    if isinstance(value, dict):
        return {name: _as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return value


def _commit() -> str | None:
    """The checked-out commit, with a mark if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
