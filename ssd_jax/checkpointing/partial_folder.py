"""Folders that appear all at once: written under a hidden name beside their place, then renamed.

Whatever a killed process leaves behind has the hidden name and is cleared by the next run for the
same place. A lock on the hidden folder, which the kernel drops when its owner dies, tells what is
left behind from what is in the making.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ssd_jax.errors import CheckpointError


@contextlib.contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination, which takes its place when the block ends without error.

    A folder already there is removed, so the caller must have decided that it may go.

    Raises:
        CheckpointError: another process is writing to the same destination.
        OSError: as the file system says.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(destination)
    partial = _hidden_name(destination)
    partial.mkdir()
    lock = _lock(partial)
    try:
        yield partial
        _sync_folder(partial)
        _swap_in(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file and wait until its contents are on disk."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())


def write_synced(target: Path, text: str) -> None:
    """Write a text file and wait until its contents are on disk."""
    with target.open("w", encoding="utf-8") as writer:
        writer.write(text)
        writer.flush()
        os.fsync(writer.fileno())


def _swap_in(partial: Path, destination: Path) -> None:
    """Rename the finished folder to its place; what was there before is removed, or put back."""
    old = _hidden_name(destination) if destination.exists() else None
    if old is not None:
        destination.rename(old)
    try:
        partial.rename(destination)
    except OSError:
        if old is not None:
            old.rename(destination)
        raise
    _sync_folder(destination.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _clear_stale(destination: Path) -> None:
    """Remove what killed runs for the same destination left behind."""
    for stale in destination.parent.glob(f"{_hidden_prefix(destination)}*"):
        lock = _lock(stale)
        if lock is None:
            raise CheckpointError(
                f"Expected to be the only one writing {destination}, but another process is at it "
                f"in {stale}; wait until it is done."
            )
        shutil.rmtree(stale)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Descriptor that holds the folder's lock until it is closed; None if someone else holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _hidden_name(destination: Path) -> Path:
    return destination.parent / f"{_hidden_prefix(destination)}{uuid.uuid4().hex[:12]}"


def _hidden_prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


def _sync_folder(folder: Path) -> None:
    """Wait until the folder's entries (not the files behind them) are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
