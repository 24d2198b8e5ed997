"""Leaves in and out of Orbax, a bounded number of bytes at a time.

Orbax copies everything it is given before it writes. Therefore the weights are stored as several
small Orbax checkpoints, `params/00000` and so on, each of them a dict of leaf name to array of up
to `PART_BYTES` (or one larger leaf). Orbax is imported where it is needed: that can take a second,
which loading a Hugging Face folder should not cost.
"""

import contextlib
import logging
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ssd_jax.checkpointing.manifest import FileRecord, StoredLeaf
from ssd_jax.errors import CheckpointError, shortened
from ssd_jax.json_files import is_file, shown_path

PARAMS_FOLDER = "params"
PART_BYTES = 64 * 2**20


def write_parts(
    folder: Path, leaves: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[StoredLeaf, int]]:
    """Where each leaf went and the CRC-32 of its bytes; the leaves are consumed on the way.

    Memory: three times the largest leaf, or one leaf and three times `PART_BYTES` if that is more.

    Raises:
        CheckpointError: Orbax cannot write there.
    """
    pending: dict[str, np.ndarray] = {}
    num_parts = 0
    for name, leaf in leaves:
        if pending and _num_bytes(pending) + leaf.nbytes > PART_BYTES:
            yield from _write_part(folder, f"{num_parts:05d}", pending)
            pending, num_parts = {}, num_parts + 1
        pending[name] = leaf
        del leaf
        if _num_bytes(pending) >= PART_BYTES:  # at once: the next leaf may be as large
            yield from _write_part(folder, f"{num_parts:05d}", pending)
            pending, num_parts = {}, num_parts + 1
    if pending:
        yield from _write_part(folder, f"{num_parts:05d}", pending)


def read_parts(
    folder: Path, leaves: Iterable[StoredLeaf], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """The listed leaves by name, one part in memory at a time.

    Raises:
        CheckpointError: a part is absent or damaged, or a leaf is not what the manifest says.
    """
    by_part: dict[str, list[StoredLeaf]] = {}
    for leaf in leaves:
        by_part.setdefault(leaf.part, []).append(leaf)
    for part, stored in by_part.items():
        arrays = _read_part(folder / part)
        for leaf in stored:
            array = arrays.pop(leaf.name, None)
            if array is None or array.shape != leaf.shape or array.dtype != dtype:
                raise _damaged(folder / part, f"{leaf.name} is not what the manifest says")
            yield leaf.name, array
            del array


def crc32_of(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def list_files(folder: Path) -> tuple[Path, ...]:
    """Every file that Orbax wrote below a folder."""
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file())


def check_files(folder: Path, records: Iterable[FileRecord]) -> None:
    """Return if every recorded file is there and as long as it was; contents are not read.

    Raises:
        CheckpointError: a file is absent or of another size.
    """
    for record in records:
        path = folder / record.name
        if not is_file(path):
            raise _damaged(folder, f"{record.name} is absent")
        if path.stat().st_size != record.size:
            raise _damaged(folder, f"{record.name} is not the file that was written")


def _write_part(
    folder: Path, part: str, leaves: Mapping[str, np.ndarray]
) -> list[tuple[StoredLeaf, int]]:
    """The leaves of one part and their CRC-32, after it is on disk."""
    import orbax.checkpoint as ocp

    try:
        with (
            _quiet(),
            _plain_name(folder) as place,
            ocp.PyTreeCheckpointer(use_zarr3=True) as checkpointer,
        ):
            checkpointer.save(place / part, dict(leaves))
    except Exception as error:  # tensorstore and Orbax raise many kinds, ENOSPC as ValueError
        raise CheckpointError(
            f"Expected to write weights to {shown_path(folder)}, but that failed "
            f"({_reason(error)}); check that the folder is writable and the disk not full."
        ) from error
    return [
        (StoredLeaf(name=name, part=part, shape=leaf.shape), crc32_of(leaf))
        for name, leaf in leaves.items()
    ]


def _read_part(path: Path) -> dict[str, np.ndarray]:
    """Every leaf of one part by name."""
    import orbax.checkpoint as ocp

    try:
        with (
            _quiet(),
            _plain_name(path.parent) as place,
            ocp.PyTreeCheckpointer(use_zarr3=True) as checkpointer,
        ):
            arrays = checkpointer.restore(place / path.name)
    except Exception as error:  # a damaged file shows as one of a dozen kinds
        raise _damaged(path, _reason(error)) from error
    return dict(arrays)


@contextlib.contextmanager
def _plain_name(folder: Path) -> Iterator[Path]:
    """An absolute path of the folder that Orbax takes for one.

    It looks for files by patterns, so that a path with "[1]" in it finds none, and it needs UTF-8.
    Such a folder goes by a link meanwhile.
    """
    path = folder.absolute()
    try:
        is_plain = not set("*?[") & set(str(path)) and bool(str(path).encode())
    except UnicodeEncodeError:
        is_plain = False
    if is_plain:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ssd-jax-") as holder:
        path.mkdir(parents=True, exist_ok=True)
        link = Path(holder) / "folder"
        link.symlink_to(path)
        yield link


def _num_bytes(leaves: Mapping[str, np.ndarray]) -> int:
    return sum(leaf.nbytes for leaf in leaves.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off stderr what Orbax logs about failures: we raise them, as one sentence.

    When one of several leaves fails, callbacks of the others find Orbax's event loop closed, even
    after it has returned; therefore that report stays filtered out after a failure.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    if not isinstance(hook, _WithoutStragglers):
        sys.unraisablehook = _WithoutStragglers(hook)
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)


class _WithoutStragglers:
    """A hook for exceptions that nobody can catch, but for those of callbacks that come late."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], object]) -> None:
        self._hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)


def _reason(error: Exception) -> str:
    """The gist of an error of Orbax or tensorstore, whose own texts run over many lines."""
    text = str(error)
    if "No space left on device" in text:
        return "No space left on device"
    if not text:
        return type(error).__name__
    return shortened(text.splitlines()[0].split(" [tensorstore_spec=")[0], 200)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Expected an Orbax checkpoint at {shown_path(path)}, but it is damaged "
        f"({shortened(reason, 300)}); "
        "convert the checkpoint again."
    )
