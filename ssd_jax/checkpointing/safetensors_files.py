"""Tensors of a Hugging Face folder: which there are, and their contents in small blocks.

Files are memory-mapped by the safetensors library only while one tensor is read: pages that were
touched count as this process's memory until the file is closed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # importing jax also teaches numpy the name bfloat16
import numpy as np
import safetensors

from ssd_jax.errors import CheckpointError, shortened, shown
from ssd_jax.json_files import is_file, read_json_object, shown_path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_MAX_HEADER = 100_000_000  # the library refuses longer ones

FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """Where one tensor lies; `dtype` is safetensors' name for it, such as BF16."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes; 0 for a dtype that weights never have."""
        dtype = FLOAT_DTYPES.get(self.dtype)
        return math.prod(self.shape) * dtype.itemsize if dtype else 0


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a Hugging Face folder, one or several shards.

    Raises:
        CheckpointError: the folder is absent, holds no checkpoint, or lacks shards of its index.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise CheckpointError(
            f"Expected a checkpoint folder, found none at {shown_path(folder)}; check the path."
        )
    if not is_file(folder / CONFIG_FILE):
        raise CheckpointError(
            f"Expected a checkpoint in {shown_path(folder)}, but it has no {CONFIG_FILE}; "
            "give a folder in the Hugging Face layout or one that `ssd-jax convert` wrote."
        )
    if is_file(folder / SINGLE_FILE):
        return (folder / SINGLE_FILE,)
    if is_file(folder / INDEX_FILE):
        return _shards(folder)
    others = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")
    )
    found = f"found only {shortened(', '.join(others), 200)}" if others else "found neither"
    advice = (
        "save the model again with safetensors, the others are not read because they can run code"
        if others
        else "fetch the weights"
    )
    raise CheckpointError(
        f"Expected {SINGLE_FILE} or {INDEX_FILE} in {shown_path(folder)}, {found}; {advice}."
    )


def list_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of a Hugging Face folder by key; only headers are read.

    Raises:
        CheckpointError: a file is absent, damaged or truncated, or two shards hold the same key.
    """
    tensors: dict[str, SourceTensor] = {}
    for path in checkpoint_files(folder):
        for tensor in _read_header(path):
            if tensor.key in tensors:
                raise CheckpointError(
                    f"Expected every tensor once, got {shortened(tensor.key, 80)} in both "
                    f"{tensors[tensor.key].file.name} and {path.name}; fetch the checkpoint again."
                )
            tensors[tensor.key] = tensor
    return tensors


def read_rows(tensor: SourceTensor, rows_per_block: int) -> Iterator[np.ndarray]:
    """The tensor in consecutive blocks along its first axis.

    Raises:
        CheckpointError: the file is gone or damaged.
    """
    try:
        with safetensors.safe_open(tensor.file, framework="numpy") as file:
            rows = file.get_slice(tensor.key)
            for start in range(0, tensor.shape[0], rows_per_block):
                yield rows[start : min(start + rows_per_block, tensor.shape[0])]
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(tensor.file, error) from error


def _read_header(path: Path) -> list[SourceTensor]:
    """The tensors that one file holds."""
    _refuse_repeated_names(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return [
                SourceTensor(
                    key=key, file=path, shape=tuple(part.get_shape()), dtype=part.get_dtype()
                )
                for key, part in slices.items()
            ]
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _refuse_repeated_names(path: Path) -> None:
    """Raise if the header names a tensor twice: the safetensors library would take the last one."""
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated.extend(name for name, count in counts.items() if count > 1)
        return table

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _MAX_HEADER))
        json.loads(text, object_pairs_hook=collect)
    except (OSError, ValueError, RecursionError):
        return  # the library says what is wrong
    if repeated:
        raise CheckpointError(
            f"Expected every tensor once in {shown_path(path)}, but its header has "
            f"{shown(repeated[0])} twice; fetch that file again."
        )


def _shards(folder: Path) -> tuple[Path, ...]:
    """The files that the index of a sharded checkpoint names."""
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    entries = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    names = sorted({entry for entry in entries if isinstance(entry, str)})
    wrong = [entry for entry in entries if not isinstance(entry, str) or Path(entry).name != entry]
    if wrong or not names:
        raise CheckpointError(
            f"Expected weight_map in {shown_path(index)} to map tensors to file names of that "
            f"folder, got {shown(wrong[0] if wrong else {})}; fetch that file again."
        )
    absent = [name for name in names if not is_file(folder / name)]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        listed = ", ".join(shortened(name, 80) for name in absent[:5])
        raise CheckpointError(
            f"Expected all {len(names)} shards of {INDEX_FILE} in {shown_path(folder)}, but "
            f"{listed}{more} {'is' if len(absent) == 1 else 'are'} not there; "
            "fetch what is missing."
        )
    return tuple(folder / name for name in names)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected a whole safetensors file at {shown_path(path)}, but it is damaged or truncated "
        f"({shortened(str(error), 200)}); "
        "fetch that file again."
    )
