"""From a Hugging Face folder to one of our own: Orbax weights, manifest, tokenizer files."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import DTypeLike

from ssd_jax.checkpointing.companions import check_tokenizer, companion_files
from ssd_jax.checkpointing.hf_loader import (
    HfCheckpoint,
    find_problems,
    iter_hf_leaves,
    open_hf_checkpoint,
)
from ssd_jax.checkpointing.leaves import leaf_shapes, weight_dtype
from ssd_jax.checkpointing.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    StoredLeaf,
    manifest_to_json,
    record_file,
    tool_version,
    utc_now,
)
from ssd_jax.checkpointing.orbax_io import (
    PARAMS_FOLDER,
    crc32_of,
    list_files,
    read_parts,
    write_parts,
)
from ssd_jax.checkpointing.partial_folder import (
    copy_synced,
    partial_folder,
    recover,
    write_synced,
)
from ssd_jax.checkpointing.safetensors_files import checkpoint_files
from ssd_jax.errors import CheckpointError, shortened, shown
from ssd_jax.json_files import shown_path

# Called with what is being done, the bytes done and the bytes to do.
Progress = Callable[[str, int, int], None]


def convert(
    source: Path,
    destination: Path,
    dtype: DTypeLike | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of the checkpoint that now lies at the destination.

    Nothing is there before it is complete and read back. `dtype` None keeps the stored precision
    (`HfCheckpoint.stored_dtype`); `overwrite` replaces a checkpoint that this function wrote, never
    another folder. What lies there is whole at every moment, or comes back with the next run
    (`partial_folder`). A destination that is a symbolic link stays one: what it names is written.

    Memory: about three times the largest leaf and some hundred megabytes.

    Raises:
        CheckpointError: a bad source, its tokenizer included, a destination that is taken or not
            writable, a full disk.
        ConfigError: an unsupported model.
    """
    if "\0" in str(destination):
        raise CheckpointError(
            f"Expected a path as destination, got {shown(str(destination))}; choose another one."
        )
    destination = Path(os.path.realpath(destination))
    report = progress or _ignore_progress
    try:
        recover(destination)
        checkpoint = open_hf_checkpoint(source)
        target_dtype = checkpoint.stored_dtype if dtype is None else weight_dtype(dtype)
        _refuse_taken(source, destination, overwrite)
        check_tokenizer(source, checkpoint.config)
        _refuse_small_disk(destination, checkpoint.config.num_params * target_dtype.itemsize)
        with partial_folder(destination) as partial:
            manifest = _write(checkpoint, partial, target_dtype, report)
            _refuse_taken(source, destination, overwrite)  # hours may have passed
            return manifest
    except OSError as error:
        raise CheckpointError(
            f"Expected to write a checkpoint to {shown_path(destination)}, but that failed "
            f"({shortened(str(error), 200)}); "
            "check that the folder is writable and the disk not full."
        ) from error


def _write(checkpoint: HfCheckpoint, folder: Path, dtype: np.dtype, report: Progress) -> Manifest:
    """Fill the folder, read its weights back, and only then write the manifest."""
    source_files: tuple[FileRecord, ...] = ()
    if not find_problems(checkpoint):  # else the next step says what is wrong, without the wait
        source_files = tuple(_hash_files(checkpoint_files(checkpoint.folder), report))
    total = checkpoint.config.num_params * dtype.itemsize
    leaves = _reported(iter_hf_leaves(checkpoint, dtype), "converting", total, report)
    params = folder / PARAMS_FOLDER
    checksums = dict(write_parts(params, leaves))
    _verify(checkpoint, params, checksums, dtype, report)
    names = companion_files(checkpoint.folder)
    for name in names:
        copy_synced(checkpoint.folder / name, folder / name)
    manifest = Manifest(
        config=checkpoint.config,
        source_config=checkpoint.raw_config,
        dtype=dtype.name,
        num_params=checkpoint.config.num_params,
        leaves=tuple(checksums),
        params_files=tuple(record_file(path, params) for path in list_files(params)),
        source_files=source_files,
        tokenizer_files=tuple(record_file(folder / name, folder) for name in names),
        tool=tool_version(),
        created=utc_now(),
    )
    write_synced(folder / MANIFEST_FILE, manifest_to_json(manifest))
    return manifest


def _verify(
    checkpoint: HfCheckpoint,
    params: Path,
    checksums: Mapping[StoredLeaf, int],
    dtype: np.dtype,
    report: Progress,
) -> None:
    """Read every leaf back, comparing checksums, and the table of leaves with the configuration."""
    if {leaf.name: leaf.shape for leaf in checksums} != leaf_shapes(checkpoint.config):
        raise CheckpointError(
            f"Expected the leaves of {checkpoint.folder} to be those of its configuration, got "
            f"{len(checksums)} others; report this as a bug of ssd-jax."
        )
    total = checkpoint.config.num_params * dtype.itemsize
    expected = {leaf.name: checksum for leaf, checksum in checksums.items()}
    written = read_parts(params, checksums, dtype)
    for name, leaf in _reported(written, "verifying", total, report):
        if crc32_of(leaf) != expected[name]:
            raise CheckpointError(
                f"Expected to read back what was written to {params}, but {name} differs; "
                "check the disk and try again."
            )
        del leaf  # else it stays while the next part is read


def _reported(
    leaves: Iterable[tuple[str, np.ndarray]], stage: str, total: int, report: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    """The same leaves, each reported once it has been dealt with."""
    done = 0
    report(stage, done, total)
    for name, leaf in leaves:
        done += leaf.nbytes
        yield name, leaf
        del leaf
        report(stage, done, total)


def _hash_files(files: Iterable[Path], report: Progress) -> Iterator[FileRecord]:
    """Names, sizes and hashes of the files that hold the weights."""
    sizes = {path: path.stat().st_size for path in files}
    total, done = sum(sizes.values()), 0
    report("hashing", done, total)
    for path, size in sizes.items():
        yield record_file(path, path.parent)
        done += size
        report("hashing", done, total)


def _refuse_taken(source: Path, destination: Path, overwrite: bool) -> None:
    """Raise unless the destination is free, or a converted checkpoint that may be replaced."""
    if Path(os.path.realpath(source)) in (destination, *destination.parents):
        raise CheckpointError(
            f"Expected a destination outside the source folder {source}, got {destination}; "
            "choose another one."
        )
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if overwrite and (destination / MANIFEST_FILE).is_file():
        return
    if not overwrite:
        raise CheckpointError(
            f"Expected an empty or absent destination, got {destination}, which exists; "
            "choose another one or pass --overwrite."
        )
    raise CheckpointError(
        f"Expected a converted checkpoint to overwrite, got {destination}, which has no "
        f"{MANIFEST_FILE}; remove it yourself if it may go."
    )


def _refuse_small_disk(destination: Path, num_bytes: int) -> None:
    """Raise unless the weights fit the disk uncompressed: nobody knows before how they compress."""
    parent = next(path for path in destination.parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise CheckpointError(
            f"Expected {num_bytes:,} bytes free for {destination}, got {free:,}: No space left on "
            "device; free some of it or choose another disk."
        )


def _ignore_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
