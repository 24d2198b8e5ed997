"""How much memory the containers around this process leave it (Linux control groups, v1 and v2).

`psutil` and the kernel's own figures are those of the whole machine; a process that takes more than
its group may is killed without a word.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_NO_LIMIT = 2**60  # version 1 writes a number near 2**63 for none


def container_free_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the tightest of this process's groups still has free; None without any limit.

    File contents that the kernel keeps and can drop count as free. `root` is where /proc and /sys
    are looked for.
    """
    free = [
        max(0, limit - used)
        for folder, names in _groups(root)
        if (limit := _read_number(folder / names[0])) is not None and limit < _NO_LIMIT
        if (used := _used(folder, *names[1:])) is not None
    ]
    return min(free, default=None)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folder of each group that the process is in, outer ones too, and the names of its files.

    Inside a container the group's path may be that of the host, which is not there: what is there
    lies at the top.
    """
    mounts = root / "sys" / "fs" / "cgroup"
    new = ("memory.max", "memory.current", "inactive_file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for line in _read_text(root / "proc" / "self" / "cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        relative = PurePosixPath(path.lstrip("/"))
        if ".." in relative.parts:
            relative = PurePosixPath()
        for part in (relative, *relative.parents):
            if number == "0" and not controllers:
                yield from ((place / part, new) for place in (mounts, mounts / "unified"))
            elif "memory" in controllers.split(","):
                yield mounts / "memory" / part, old


def _used(folder: Path, usage: str, droppable: str) -> int | None:
    used = _read_number(folder / usage)
    if used is None:
        return None
    for line in _read_text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == droppable and value.isdecimal():
            return max(0, used - int(value))
    return used


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdecimal() and len(text) < 30 else None  # else "max", or no file


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
