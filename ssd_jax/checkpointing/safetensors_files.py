"""Tensors of a Hugging Face folder: which there are, and their contents in small blocks.

Files are memory-mapped by the safetensors library only while one tensor is read: pages that were
touched count as this process's memory until the file is closed.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # importing jax also teaches numpy the name bfloat16
import numpy as np
import safetensors

from ssd_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

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


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Expected JSON in {path}, but it cannot be read ({error}); fetch that file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Expected a JSON object in {path}, got a {type(value).__name__}; "
            "fetch that file again."
        )
    return value


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a Hugging Face folder, one or several shards.

    Raises:
        CheckpointError: the folder is absent, holds no checkpoint, or lacks shards of its index.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"Expected a checkpoint folder, found none at {folder}; check the path."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"Expected a checkpoint in {folder}, but it has no {CONFIG_FILE}; "
            "give a folder in the Hugging Face layout or one that `ssd-jax convert` wrote."
        )
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if (folder / INDEX_FILE).is_file():
        return _shards(folder)
    others = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")
    )
    found = f"found only {', '.join(others)}" if others else "found neither"
    advice = (
        "save the model again with safetensors, the others are not read because they can run code"
        if others
        else "fetch the weights"
    )
    raise CheckpointError(f"Expected {SINGLE_FILE} or {INDEX_FILE} in {folder}, {found}; {advice}.")


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
                    f"Expected every tensor once, got {tensor.key} in both "
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


def _shards(folder: Path) -> tuple[Path, ...]:
    """The files that the index of a sharded checkpoint names."""
    weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(
            f"Expected weight_map in {folder / INDEX_FILE} to map tensors to file names of that "
            "folder, got something else; fetch that file again."
        )
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise CheckpointError(
            f"Expected all {len(names)} shards of {INDEX_FILE} in {folder}, but "
            f"{', '.join(absent)} is not there; fetch what is missing."
        )
    return tuple(folder / name for name in sorted(names))


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected a whole safetensors file at {path}, but it is damaged or truncated ({error}); "
        "fetch that file again."
    )
