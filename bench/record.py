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

from ssd_jax.errors import RequestError
from ssd_jax.whole_file import write_whole

SCHEMA = 2  # of the records of `ssd-jax bench run`; raised when a field changes its meaning


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
    text = json.dumps(record, indent=2) + "\n"
    if path is None:
        print(text, end="")
        return
    write_whole(path, text.encode())


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
    if record.get("kind") != "run":
        raise RequestError(
            f"{path} should be a record of `ssd-jax bench run`, got one of kind "
            f"{record.get('kind')!r}: name another file."
        )
    if record["schema"] != SCHEMA:
        raise RequestError(
            f"{path} should have schema {SCHEMA}, got {record['schema']!r}: it was written by "
            "another version of the benchmark, so measure again into another file."
        )


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
