"""Weights of a Hugging Face folder, one leaf of our tree at a time.

Blocks of about a megabyte go straight from the file into their place in the leaf: beside the leaf,
only the mapped pages of one source tensor take memory, and the transposed writes stay in the cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ssd_jax.checkpointing.hf_names import (
    EMBEDDING_KEY,
    LM_HEAD_KEY,
    LeafSpec,
    Piece,
    is_ignorable_key,
    leaf_specs,
    plain_names,
)
from ssd_jax.checkpointing.leaves import BFLOAT16, FLOAT32, params_from_leaves, weight_dtype
from ssd_jax.checkpointing.safetensors_files import (
    CONFIG_FILE,
    FLOAT_DTYPES,
    SourceTensor,
    checkpoint_files,
    list_tensors,
    read_rows,
)
from ssd_jax.config import ModelConfig, model_config_from_hf
from ssd_jax.errors import CheckpointError, ConfigError, shortened, shown
from ssd_jax.json_files import read_json_object, shown_path
from ssd_jax.types import ModelParams

_BLOCK_BYTES = 2**20
_MAX_LISTED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HfCheckpoint:
    """What the headers of a Hugging Face folder say; no weights are in memory.

    `tensors` are under the names of `hf_names`, which those in the files may differ from.
    """

    folder: Path
    raw_config: Mapping[str, Any]
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype that keeps every weight exactly: bfloat16 if all are, float32 otherwise."""
        kinds = {
            tensor.dtype for name, tensor in self.tensors.items() if not is_ignorable_key(name)
        }
        return BFLOAT16 if kinds == {"BF16"} else FLOAT32


def open_hf_checkpoint(folder: Path) -> HfCheckpoint:
    """The configuration and the tensor table of a Hugging Face folder.

    Raises:
        CheckpointError: no checkpoint there, or a damaged file.
        ConfigError: an unsupported configuration.
    """
    checkpoint_files(folder)  # says what is missing before any file is parsed
    raw_config = read_json_object(folder / CONFIG_FILE)
    try:
        config = model_config_from_hf(raw_config)
    except ConfigError as error:
        raise ConfigError(f"In {shown_path(folder)}: {error}") from error
    tensors = _by_plain_name(list_tensors(folder))
    if config.num_layers > len(tensors):  # before any table of that many layers is built
        raise CheckpointError(
            f"Expected tensors for the {config.num_layers} layers of {CONFIG_FILE} in "
            f"{shown_path(folder)}, got only {len(tensors)} tensors; correct num_hidden_layers or "
            "fetch the checkpoint again."
        )
    return HfCheckpoint(folder=folder, raw_config=raw_config, config=config, tensors=tensors)


def _by_plain_name(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under the names of our table."""
    renamed: dict[str, SourceTensor] = {}
    for key, name in plain_names(tensors).items():
        if name in renamed:
            raise CheckpointError(
                f"Expected every tensor once, got {shown(renamed[name].key)} and {shown(key)}, "
                f"which both mean {shown(name)}; save the model again, unwrapped."
            )
        renamed[name] = tensors[key]
    return renamed


def find_problems(checkpoint: HfCheckpoint) -> dict[str, list[str]]:
    """Missing, unexpected, mis-shaped and non-float tensors by kind; empty when all is well."""
    problems: dict[str, list[str]] = {}
    unclaimed = dict(checkpoint.tensors)
    for key, shape in _expected_shapes(checkpoint).items():
        tensor = unclaimed.pop(key, None)
        if tensor is None:
            problems.setdefault("missing", []).append(key)
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.setdefault("not floating point", []).append(f"{key} ({tensor.dtype})")
        elif tensor.shape != shape:
            problems.setdefault("of the wrong shape", []).append(
                f"{key} (expected {list(shape)}, got {list(tensor.shape)})"
            )
    unexpected = [key for key in unclaimed if not is_ignorable_key(key)]
    if unexpected:
        problems["unexpected"] = sorted(unexpected)
    return problems


def iter_hf_leaves(checkpoint: HfCheckpoint, dtype: DTypeLike) -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf of our tree by name, cast to the dtype, made when it is asked for.

    Raises:
        CheckpointError: a damaged file at once; after the last leaf, one error that lists every
            tensor that is missing, unexpected, mis-shaped, not floating point or not finite in the
            dtype. If the headers already show a problem, no leaf comes at all.
    """
    target_dtype = weight_dtype(dtype)
    problems = find_problems(checkpoint)
    readable = not problems
    not_finite: list[str] = []
    for spec in leaf_specs(checkpoint.config):
        if readable:
            leaf, bad_keys = _read_leaf(spec, checkpoint.tensors, target_dtype)
            yield spec.name, leaf
            del leaf
        else:
            keys = [piece.key for piece in spec.pieces if piece.key in checkpoint.tensors]
            bad_keys = [
                key for key in keys if not _is_finite(checkpoint.tensors[key], target_dtype)
            ]
        not_finite += bad_keys
    if not_finite:
        problems[f"not finite in {target_dtype.name}"] = not_finite
    if readable and not _redundant_lm_head_agrees(checkpoint):
        problems["different from the embedding although the embeddings are tied"] = [LM_HEAD_KEY]
    if problems:
        raise CheckpointError(_describe_problems(checkpoint.folder, problems))


def read_hf_params(checkpoint: HfCheckpoint, dtype: DTypeLike) -> ModelParams:
    """The weights of a Hugging Face folder, on the default device.

    Raises:
        CheckpointError: see `iter_hf_leaves`.
    """
    arrays = {name: jnp.asarray(leaf) for name, leaf in iter_hf_leaves(checkpoint, dtype)}
    return params_from_leaves(checkpoint.config, arrays)


def _expected_shapes(checkpoint: HfCheckpoint) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the checkpoint must hold, by key."""
    shapes = {
        piece.key: piece.tensor_shape(spec.shape)
        for spec in leaf_specs(checkpoint.config)
        for piece in spec.pieces
    }
    if checkpoint.config.tied_embeddings and LM_HEAD_KEY in checkpoint.tensors:
        shapes[LM_HEAD_KEY] = shapes[EMBEDDING_KEY]
    return shapes


def _read_leaf(
    spec: LeafSpec, tensors: Mapping[str, SourceTensor], dtype: np.dtype
) -> tuple[np.ndarray, list[str]]:
    """A leaf put together from its tensors, and the keys of those that are not finite."""
    leaf = np.empty(spec.shape, dtype)
    not_finite = [piece.key for piece in spec.pieces if not _fill(piece.view(leaf), tensors, piece)]
    return leaf, not_finite


def _fill(view: np.ndarray, tensors: Mapping[str, SourceTensor], piece: Piece) -> bool:
    """Write a tensor through a view of its leaf; True if all its values are finite."""
    tensor = tensors[piece.key]
    rows_per_entry = tensor.shape[0] // view.shape[0]
    entry_bytes = tensor.num_bytes // view.shape[0]
    entries = max(1, _BLOCK_BYTES // max(1, entry_bytes))
    is_finite, start = True, 0
    for block in _cast_blocks(tensor, entries * rows_per_entry, view.dtype):
        target = view[start : start + entries]
        target[...] = block.reshape(target.shape)
        is_finite &= bool(np.isfinite(block).all())
        start += entries
    return is_finite


def _cast_blocks(
    tensor: SourceTensor, rows_per_block: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tensor's blocks in another dtype; what does not fit becomes infinite, silently."""
    for block in read_rows(tensor, rows_per_block):
        with np.errstate(over="ignore", invalid="ignore"):
            cast = block.astype(dtype, copy=False)
        yield cast


def _is_finite(tensor: SourceTensor, dtype: np.dtype) -> bool:
    """Whether all values of a tensor are finite in the dtype; True for other kinds of numbers."""
    if tensor.dtype not in FLOAT_DTYPES or not tensor.shape:
        return True
    return all(
        bool(np.isfinite(block).all())
        for block in _cast_blocks(tensor, _rows_per_block(tensor), dtype)
    )


def _redundant_lm_head_agrees(checkpoint: HfCheckpoint) -> bool:
    """Whether an output matrix stored beside tied embeddings equals them; True if there is none."""
    if not checkpoint.config.tied_embeddings or LM_HEAD_KEY not in checkpoint.tensors:
        return True
    pair = checkpoint.tensors[EMBEDDING_KEY], checkpoint.tensors[LM_HEAD_KEY]
    rows = _rows_per_block(pair[0])
    blocks = zip(*(read_rows(tensor, rows) for tensor in pair), strict=True)
    return all(np.array_equal(embedding, lm_head) for embedding, lm_head in blocks)


def _rows_per_block(tensor: SourceTensor) -> int:
    """Rows of a tensor that make up about one block."""
    return max(1, _BLOCK_BYTES * tensor.shape[0] // max(1, tensor.num_bytes))


def _describe_problems(folder: Path, problems: Mapping[str, Iterable[str]]) -> str:
    """One sentence that lists the tensors of every kind of problem."""
    parts = []
    for kind, keys in problems.items():
        keys = list(keys)
        more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
        listed = ", ".join(shortened(key, 80) for key in keys[:_MAX_LISTED])
        parts.append(f"{len(keys)} {kind}: {listed}{more}")
    return (
        f"Expected the tensors of {shown_path(folder)} to be those that its {CONFIG_FILE} "
        f"describes, got {'; '.join(parts)}; fetch the checkpoint again or correct {CONFIG_FILE}."
    )
