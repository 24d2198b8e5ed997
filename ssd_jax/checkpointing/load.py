"""Checkpoints into memory, whichever of the two formats they are in."""

from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ssd_jax.checkpointing.hf_loader import open_hf_checkpoint, read_hf_params
from ssd_jax.checkpointing.leaves import params_from_leaves, weight_dtype
from ssd_jax.checkpointing.manifest import MANIFEST_FILE, read_manifest
from ssd_jax.checkpointing.orbax_io import PARAMS_FOLDER, check_files, read_parts
from ssd_jax.config import ModelConfig
from ssd_jax.json_files import is_file
from ssd_jax.types import ModelParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedCheckpoint:
    """A model in memory, on the default device, and the folder with its tokenizer files."""

    config: ModelConfig
    params: ModelParams = field(repr=False)
    dtype: np.dtype
    tokenizer_folder: Path


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in a folder of either format, no weight read.

    Raises:
        CheckpointError, ConfigError: as `load_checkpoint`.
    """
    if is_file(folder / MANIFEST_FILE):
        return read_manifest(folder).config
    return open_hf_checkpoint(folder).config


def load_checkpoint(folder: Path, dtype: DTypeLike | None = None) -> LoadedCheckpoint:
    """The checkpoint in a folder that `convert` wrote, or in a Hugging Face folder.

    Without a dtype the weights are as stored, float16 widened to float32.

    Memory: the weights, and beside them a few times the largest leaf while loading.

    Raises:
        CheckpointError: no checkpoint there, or a damaged or incomplete one.
        ConfigError: an unsupported model.
    """
    if is_file(folder / MANIFEST_FILE):
        return _load_converted(folder, dtype)
    checkpoint = open_hf_checkpoint(folder)
    target_dtype = checkpoint.stored_dtype if dtype is None else weight_dtype(dtype)
    return LoadedCheckpoint(
        config=checkpoint.config,
        params=read_hf_params(checkpoint, target_dtype),
        dtype=target_dtype,
        tokenizer_folder=folder,
    )


def _load_converted(folder: Path, dtype: DTypeLike | None) -> LoadedCheckpoint:
    """The checkpoint in a folder that `convert` wrote."""
    manifest = read_manifest(folder)
    stored_dtype = weight_dtype(manifest.dtype)
    target_dtype = stored_dtype if dtype is None else weight_dtype(dtype)
    check_files(folder / PARAMS_FOLDER, manifest.params_files)
    leaves = read_parts(folder / PARAMS_FOLDER, manifest.leaves, stored_dtype)
    arrays = {name: jnp.asarray(leaf.astype(target_dtype, copy=False)) for name, leaf in leaves}
    return LoadedCheckpoint(
        config=manifest.config,
        params=params_from_leaves(manifest.config, arrays),
        dtype=target_dtype,
        tokenizer_folder=folder,
    )
