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
from ssd_jax.checkpointing.safetensors_files import CONFIG_FILE, SINGLE_FILE
from ssd_jax.config import ModelConfig, RopeScaling, model_config_from_hf
from ssd_jax.errors import CheckpointError, ConfigError
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
    """Write config.json and model.safetensors into a folder, each complete or not at all.

    Other files of the folder, such as the tokenizer's, stay. `extra_config` adds fields that are
    not about the maths, such as `bos_token_id` and `eos_token_id`.

    Memory: the weights once more.

    Raises:
        CheckpointError: the layout cannot express the model, or the folder cannot be written.
    """
    dtype = weight_dtype(params.embedding.dtype)
    raw_config = {**(extra_config or {}), **hf_config(config, dtype)}
    tensors = hf_tensors(config, params)
    unfinished = {name: folder / f".{name}.partial" for name in (SINGLE_FILE, CONFIG_FILE)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, unfinished[SINGLE_FILE], metadata={"format": "pt"})
        text = json.dumps(raw_config, indent=2, sort_keys=True) + "\n"
        unfinished[CONFIG_FILE].write_text(text, encoding="utf-8")
        # safetensors makes its file readable by the owner alone; the user's umask should decide.
        shutil.copymode(unfinished[CONFIG_FILE], unfinished[SINGLE_FILE])
        for name, path in unfinished.items():
            os.replace(path, folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"Expected to write a checkpoint to {folder}, but that failed ({error}); "
            "check that the folder is writable and the disk not full."
        ) from error
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


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
