"""From our tree back to a folder in the Hugging Face layout, for other programs to read."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ssd_jax.checkpointing.hf_names import leaf_specs
from ssd_jax.checkpointing.leaves import leaves_of, weight_dtype
from ssd_jax.checkpointing.partial_folder import partial_folder, write_synced
from ssd_jax.checkpointing.safetensors_files import CONFIG_FILE, SINGLE_FILE
from ssd_jax.config import ModelConfig, RopeScaling, model_config_from_hf
from ssd_jax.errors import CheckpointError, ConfigError, shortened
from ssd_jax.json_files import shown_path
from ssd_jax.types import ModelParams

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def export_hf(
    config: ModelConfig,
    params: ModelParams,
    folder: Path,
    *,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors into a folder, both at once or not at all.

    Other files of the folder, such as the tokenizer's, stay: a new folder with links to them takes
    its place (see `partial_folder`). `extra_config` adds fields that are not about the maths, such
    as `bos_token_id` and `eos_token_id`.

    Memory: the weights once more.

    Raises:
        CheckpointError: the layout cannot express the model, or the folder cannot be written.
    """
    dtype = weight_dtype(params.embedding.dtype)
    raw_config = {**(extra_config or {}), **hf_config(config, dtype)}
    tensors = hf_tensors(config, params)
    try:
        destination = Path(os.path.realpath(folder))
        with partial_folder(destination) as partial:
            if destination.is_dir():
                _link_others(destination, partial)
            write_synced(
                partial / CONFIG_FILE, json.dumps(raw_config, indent=2, sort_keys=True) + "\n"
            )
            safetensors.numpy.save_file(tensors, partial / SINGLE_FILE, metadata={"format": "pt"})
            # safetensors makes its file readable by the owner alone; the umask should decide.
            shutil.copymode(partial / CONFIG_FILE, partial / SINGLE_FILE)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"Expected to write a checkpoint to {shown_path(folder)}, but that failed "
            f"({shortened(str(error), 200)}); "
            "check that the folder is writable and the disk not full."
        ) from error


def _link_others(folder: Path, partial: Path) -> None:
    """What the folder holds beside the two files, under the same names in the new one."""

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(source, target, follow_symlinks=False)
        return target

    for entry in folder.iterdir():
        if entry.name in (CONFIG_FILE, SINGLE_FILE):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, partial / entry.name, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(partial / entry.name))


def hf_tensors(config: ModelConfig, params: ModelParams) -> dict[str, np.ndarray]:
    """Every tensor of the model under its Hugging Face key, in that layout."""
    leaves = leaves_of(params)
    tensors = {}
    for spec in leaf_specs(config):
        leaf = np.asarray(leaves[spec.name])
        for piece in spec.pieces:
            shape = piece.tensor_shape(spec.shape)
            tensors[piece.key] = np.ascontiguousarray(piece.view(leaf)).reshape(shape)
    return tensors


def hf_config(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """The config.json of a model, with the older names of the RoPE and dtype fields.

    Those are understood by every version of transformers and by converters to other formats.

    Raises:
        CheckpointError: the family's config.json has no field for something in the configuration.
    """
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "torch_dtype": dtype.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _hf_rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "use_cache": True,
    }
    if config.family != "qwen2":
        raw["attention_bias"] = config.output_bias
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    try:
        is_faithful = model_config_from_hf(raw) == config
    except ConfigError:
        is_faithful = False
    if not is_faithful:
        raise CheckpointError(
            f"Expected a model that a {config.family} config.json can describe, got {config}; "
            "its combination of biases and norms does not exist in that family."
        )
    return raw


def _hf_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` field of config.json; its kind goes by two names in older versions."""
    if scaling is None:
        return None
    fields: dict[str, Any] = {
        "type": scaling.kind,
        "rope_type": scaling.kind,
        "factor": scaling.factor,
    }
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_context,
        }
    return fields
