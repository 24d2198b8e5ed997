"""From a Hugging Face folder to one of our own: Orbax weights, manifest, tokenizer files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import DTypeLike

from ssd_jax.checkpointing.hf_loader import (
    HfCheckpoint,
    find_problems,
    iter_hf_leaves,
    open_hf_checkpoint,
)
from ssd_jax.checkpointing.leaves import leaf_shapes, weight_dtype
from ssd_jax.checkpointing.manifest import (
    MANIFEST_FILE,
    Manifest,
    SourceFile,
    StoredLeaf,
    manifest_to_json,
    tool_version,
    utc_now,
)
from ssd_jax.checkpointing.orbax_io import PARAMS_FOLDER, read_parts, write_parts
from ssd_jax.checkpointing.partial_folder import copy_synced, partial_folder, write_synced
from ssd_jax.checkpointing.safetensors_files import checkpoint_files
from ssd_jax.errors import CheckpointError

# What a tokenizer may need, and the settings that name its special ids; all of it small.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

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
    another folder.

    Memory: about three times the largest leaf and some hundred megabytes.

    Raises:
        CheckpointError: a bad source, a destination that is taken or not writable, a full disk.
        ConfigError: an unsupported model.
    """
    checkpoint = open_hf_checkpoint(source)
    target_dtype = checkpoint.stored_dtype if dtype is None else weight_dtype(dtype)
    destination = destination.absolute()
    _refuse_taken(source, destination, overwrite)
    report = progress or _ignore_progress
    try:
        with partial_folder(destination) as partial:
            return _write(checkpoint, partial, target_dtype, report)
    except OSError as error:
        raise CheckpointError(
            f"Expected to write a checkpoint to {destination}, but that failed ({error}); "
            "check that the folder is writable and the disk not full."
        ) from error


def _write(checkpoint: HfCheckpoint, folder: Path, dtype: np.dtype, report: Progress) -> Manifest:
    """Fill the folder, read its weights back, and only then write the manifest."""
    source_files: tuple[SourceFile, ...] = ()
    if not find_problems(checkpoint):  # else the next step says what is wrong, without the wait
        source_files = tuple(_hash_files(checkpoint_files(checkpoint.folder), report))
    total = checkpoint.config.num_params * dtype.itemsize
    leaves = _reported(iter_hf_leaves(checkpoint, dtype), "converting", total, report)
    stored = tuple(write_parts(folder / PARAMS_FOLDER, leaves))
    _verify(checkpoint, folder, stored, dtype, report)
    names = [name for name in COMPANION_FILES if (checkpoint.folder / name).is_file()]
    for name in names:
        copy_synced(checkpoint.folder / name, folder / name)
    manifest = Manifest(
        config=checkpoint.config,
        source_config=checkpoint.raw_config,
        dtype=dtype.name,
        num_params=checkpoint.config.num_params,
        leaves=stored,
        source_files=source_files,
        tokenizer_files=tuple(names),
        tool=tool_version(),
        created=utc_now(),
    )
    write_synced(folder / MANIFEST_FILE, manifest_to_json(manifest))
    return manifest


def _verify(
    checkpoint: HfCheckpoint,
    folder: Path,
    stored: tuple[StoredLeaf, ...],
    dtype: np.dtype,
    report: Progress,
) -> None:
    """Read every leaf back, comparing checksums, and the table of leaves with the configuration."""
    if {leaf.name: leaf.shape for leaf in stored} != leaf_shapes(checkpoint.config):
        raise CheckpointError(
            f"Expected the leaves of {checkpoint.folder} to be those of its configuration, got "
            f"{len(stored)} others; report this as a bug of ssd-jax."
        )
    total = checkpoint.config.num_params * dtype.itemsize
    written = read_parts(folder / PARAMS_FOLDER, stored, dtype)
    for _ in _reported(written, "verifying", total, report):
        pass


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


def _hash_files(files: Iterable[Path], report: Progress) -> Iterator[SourceFile]:
    """Names, sizes and hashes of the files that hold the weights."""
    sizes = {path: path.stat().st_size for path in files}
    total, done = sum(sizes.values()), 0
    report("hashing", done, total)
    for path, size in sizes.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield SourceFile(name=path.name, size=size, sha256=digest)
        done += size
        report("hashing", done, total)


def _refuse_taken(source: Path, destination: Path, overwrite: bool) -> None:
    """Raise unless the destination is free, or a converted checkpoint that may be replaced."""
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
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


def _ignore_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
