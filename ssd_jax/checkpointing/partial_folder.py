"""Folders that appear all at once: written under a hidden name beside their place, then renamed.

At every moment a whole folder has the destination's name, or a name from which the next run for the
same destination brings it back:

    .NAME.partial-ID   in the making, or what was replaced: the next run removes it
    .NAME.replaced-ID  always whole, what had the destination's name, between the two renames that
                       take the place of an exchange of names: the next run puts it back

A lock on the hidden folder, which the kernel drops when its owner dies, tells what is left behind
from what is in the making. A lock on the folder around all of them, held for moments, keeps two
runs from tidying up at once.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ssd_jax.checkpointing.exchange import exchange_names
from ssd_jax.errors import CheckpointError
from ssd_jax.json_files import shown_path


@contextlib.contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination, which takes its place when the block ends without error.

    A folder already there is removed, so the caller must have decided that it may go. The
    destination is no symbolic link: renaming would replace the link.

    Raises:
        CheckpointError: another process is writing to the same destination.
        OSError: as the file system says.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _tidying(destination):
        partial = _hidden_name(destination, "partial")
        partial.mkdir()
        lock = _lock(partial)
    try:
        yield partial
        _sync_folders(partial)
        with _locked(destination.parent):
            _put_in_place(partial, destination)
            shutil.rmtree(partial, ignore_errors=True)  # what the destination was before
    except BaseException:
        _remove_persistently(partial)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def recover(destination: Path) -> None:
    """Bring back what a killed run left under another name, and remove what it left unfinished.

    Raises:
        CheckpointError: another process is writing to the same destination.
        OSError: as the file system says.
    """
    if destination.parent.is_dir():
        with _tidying(destination):
            pass


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


def _put_in_place(partial: Path, destination: Path) -> None:
    """Give the finished folder its name; what had it has the hidden name afterwards, if any had."""
    if not destination.exists() or not exchange_names(partial, destination):
        _rename_in_two_steps(partial, destination)
    _sync_folders(destination.parent, deep=False)


def _rename_in_two_steps(partial: Path, destination: Path) -> None:
    """The same where names cannot be exchanged; killed in between, the old folder is whole."""
    old = _hidden_name(destination, "replaced") if destination.exists() else None
    if old is not None:
        destination.rename(old)
    try:
        partial.rename(destination)
    except BaseException:
        if old is not None and not destination.exists():
            old.rename(destination)
        raise
    if old is not None:
        _sync_folders(destination.parent, deep=False)
        old.rename(partial)


def _remove_persistently(folder: Path) -> None:
    """Remove a folder into which threads of Orbax may write a little longer after a failure.

    What stays all the same has a hidden name, which the next run knows.
    """
    absent = 0
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == 3:
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _tidying(destination: Path) -> Iterator[None]:
    """A block in which nothing is left of killed runs, and no other run begins or ends."""
    with _locked(destination.parent):
        for old in _hidden_folders(destination, "replaced"):
            if destination.exists():
                old.rename(_hidden_name(destination, "partial"))  # from now on it may be in pieces
            else:
                old.rename(destination)
        for stale in _hidden_folders(destination, "partial"):
            lock = _lock(stale)
            if lock is None:
                raise CheckpointError(
                    f"Expected to be the only one writing {shown_path(destination)}, but another "
                    f"process is at it in {shown_path(stale)}; wait until it is done."
                )
            shutil.rmtree(stale)
            os.close(lock)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A block that one process at a time is in, for each folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Descriptor that holds the folder's lock until it is closed; None if someone else holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _hidden_folders(destination: Path, kind: str) -> list[Path]:
    """What runs for this destination, and for no other, left under hidden names of a kind."""
    pattern = re.compile(re.escape(f".{destination.name}.{kind}-") + "[0-9a-f]{12}")
    names = sorted(name for name in os.listdir(destination.parent) if pattern.fullmatch(name))
    return [destination.parent / name for name in names]


def _hidden_name(destination: Path, kind: str) -> Path:
    return destination.parent / f".{destination.name}.{kind}-{uuid.uuid4().hex[:12]}"


def _sync_folders(folder: Path, *, deep: bool = True) -> None:
    """Wait until the entries of a folder, and of those in it, are on disk (not the files')."""
    for path, names, _ in os.walk(folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not deep:
            names.clear()
