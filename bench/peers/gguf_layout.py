"""Hugging Face checkpoints in the terms of GGUF: names, fields, and what is stored otherwise.

Facts about the format are llama.cpp's (its `gguf` package and loader). Needs numpy alone, so that
it runs in the environment that has `gguf`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Field = tuple[Literal["uint32", "float32", "string", "bool", "strings", "int32s"], Any]

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# The regular expressions by which text is split before merges, as llama.cpp names them.
_SPLITTERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
UNKNOWN_SPLITTER = "default"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
FAMILIES = ("llama", "qwen2", "qwen3")


def gguf_name(key: str) -> str:
    """The GGUF name of a Hugging Face tensor; KeyError for one that GGUF has no place for."""
    if key in _OUTER:
        return _OUTER[key]
    match = _LAYER_KEY.fullmatch(key)
    if match is None:
        raise KeyError(key)
    layer, module, kind = match.groups()
    return f"blk.{layer}.{_OF_LAYER[module]}.{kind}"


def pair_neighbours(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """A query or key projection [N*H, D] (or bias [N*H]) whose rotated pairs lie side by side.

    Hugging Face rotates row i of a head with row i + H/2; llama.cpp rotates rows 2i and 2i + 1 for
    Llama, and only for Llama.
    """
    rows = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(tensor.shape)


def gguf_tensor(config: Mapping[str, Any], key: str, tensor: np.ndarray) -> np.ndarray:
    """A Hugging Face tensor as llama.cpp expects it."""
    if config["model_type"] == "llama" and ".self_attn." in key:
        if ".q_proj." in key:
            return pair_neighbours(tensor, config["num_attention_heads"])
        if ".k_proj." in key:
            return pair_neighbours(tensor, config["num_key_value_heads"])
    return tensor


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """What RoPE frequencies are divided by under Llama 3.1's scaling, float32 [H/2], else None."""
    scaling = config.get("rope_scaling")
    if not scaling or scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    head_dim = _head_dim(config)
    frequencies = config["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
    keep = np.clip((turns - scaling["low_freq_factor"]) / span, 0.0, 1.0)
    return (1 / (keep + (1 - keep) / scaling["factor"])).astype(np.float32)


def model_fields(config: Mapping[str, Any]) -> dict[str, Field]:
    """The fields of a GGUF file that describe the model, without its architecture's name."""
    family = config["model_type"]
    head_dim = _head_dim(config)
    fields: dict[str, Field] = {
        "context_length": ("uint32", config["max_position_embeddings"]),
        "embedding_length": ("uint32", config["hidden_size"]),
        "block_count": ("uint32", config["num_hidden_layers"]),
        "feed_forward_length": ("uint32", config["intermediate_size"]),
        "attention.head_count": ("uint32", config["num_attention_heads"]),
        "attention.head_count_kv": ("uint32", config["num_key_value_heads"]),
        "attention.key_length": ("uint32", head_dim),
        "attention.value_length": ("uint32", head_dim),
        "attention.layer_norm_rms_epsilon": ("float32", config["rms_norm_eps"]),
        "rope.dimension_count": ("uint32", head_dim),
        "rope.freq_base": ("float32", config["rope_theta"]),
        "vocab_size": ("uint32", config["vocab_size"]),
    }
    scaling = config.get("rope_scaling")
    if scaling and scaling.get("rope_type", scaling.get("type")) == "linear":
        fields["rope.scaling.type"] = ("string", "linear")
        fields["rope.scaling.factor"] = ("float32", scaling["factor"])
    return {f"{family}.{name}": field for name, field in fields.items()}


def ids_only_fields(vocab_size: int) -> dict[str, Field]:
    """A vocabulary whose tokens are names of their ids and none of which ends a text.

    llama.cpp takes tokens for ends by their text alone and then stops, whatever it was asked for;
    under these fields it gives as many tokens as were asked for.
    """
    return {
        "tokenizer.ggml.model": ("string", "test"),
        "tokenizer.ggml.tokens": ("strings", [f"id{index}" for index in range(vocab_size)]),
        "tokenizer.ggml.token_type": ("int32s", [_NORMAL] * vocab_size),
    }


def tokenizer_fields(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Field]:
    """The fields of a byte-level BPE tokenizer, from the contents of its tokenizer.json.

    `settings` are those of tokenizer_config.json. Where llama.cpp has no name for the expression
    that splits text, "default" stands in: it then cuts some texts otherwise, and prompts should be
    given as ids.

    Raises:
        ValueError: the tokenizer is of another kind.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or not _is_byte_level(tokenizer.get("pre_tokenizer")):
        raise ValueError(
            f"Expected a byte-level BPE tokenizer, got one of type {model['type']}: write the file "
            "with --ids-only."
        )
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    by_id = {index: token for token, index in model["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    size = config["vocab_size"]
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    kinds = [_NORMAL if index in by_id else _USER_DEFINED for index in range(size)]
    for index, token in added.items():
        kinds[index] = _CONTROL if token["special"] else _USER_DEFINED
    merges = [
        merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)
        for merge in model["merges"]
    ]
    fields: dict[str, Field] = {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", splitter_name(tokenizer)),
        "tokenizer.ggml.tokens": ("strings", tokens),
        "tokenizer.ggml.token_type": ("int32s", kinds),
        "tokenizer.ggml.merges": ("strings", merges),
        "tokenizer.ggml.add_bos_token": ("bool", settings.get("add_bos_token") is True),
    }
    for name in ("bos", "eos"):
        value = config.get(f"{name}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            fields[f"tokenizer.ggml.{name}_token_id"] = ("uint32", first)
    if isinstance(template := settings.get("chat_template"), str):
        fields["tokenizer.chat_template"] = ("string", template)
    return fields


def splitter_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text before merging."""
    for step in _steps(tokenizer.get("pre_tokenizer")):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            return _SPLITTERS.get(step["pattern"]["Regex"], UNKNOWN_SPLITTER)
        if step["type"] == "ByteLevel" and step.get("use_regex", True):
            return "gpt-2"
    return UNKNOWN_SPLITTER


def _is_byte_level(step: Mapping[str, Any] | None) -> bool:
    return any(one["type"] == "ByteLevel" for one in _steps(step))


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, a sequence taken apart."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for one in step["pretokenizers"] for inner in _steps(one)]


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
