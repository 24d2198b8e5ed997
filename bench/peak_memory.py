"""The most memory that was in use."""

import re
from pathlib import Path

import jax

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET_PEAK = "5"  # see proc(5)


def forget_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can."""
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:
        return


def peak_bytes() -> dict[str, int | None]:
    """Most resident memory of this process, and most of the first device's own memory, in bytes.

    None where the system does not tell. A device counts from its start.
    """
    try:
        status = _STATUS.read_text()
    except OSError:
        status = ""
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "resident": int(found[1]) * 1024 if found else None,
        "device": stats.get("peak_bytes_in_use"),
    }
