"""The record of a run: where it ran, and writing it so that no half-written file is left."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import jax

from ssd_jax.whole_file import write_whole


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
