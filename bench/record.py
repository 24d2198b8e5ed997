"""The record of a run: where it ran, and writing it so that no half-written file is left."""

import datetime
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import jax

from ssd_jax.errors import RequestError


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
        RequestError: the file cannot be written.
    """
    text = json.dumps(record, indent=2) + "\n"
    if path is None:
        print(text, end="")
        return
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RequestError(
            f"The record should go to {path}, which cannot be written ({error.strerror}): name "
            "another file."
        ) from error


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
