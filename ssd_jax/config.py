"""Model configurations, read from a checkpoint's `config.json`.

`ModelConfig` is frozen and hashable, so it is a static argument of every jitted program. A field of
`config.json` is either understood, or known not to touch the maths of inference, or refused by
name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ssd_jax.errors import ConfigError

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")

# Fields that say how a model was trained, stored or is sampled from, not what it computes.
# fmt: off
_IRRELEVANT_FIELDS = frozenset(
    [
        "_attn_implementation_autoset", "_name_or_path", "architectures",
        "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "do_sample", "dtype", "eos_token_id",
        "finetuning_task", "hidden_dropout", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "max_length",
        "max_window_layers", "min_length", "model_type", "num_beams", "output_attentions",
        "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
        "return_dict", "rms_norm_eps", "sep_token_id", "task_specific_params",
        "temperature", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "torchscript", "transformers_version", "typical_p", "unsloth_fixed",
        "unsloth_version", "use_bfloat16", "use_cache",
    ]
)
# fmt: on


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched for contexts longer than the pretraining one.

    `linear` divides every frequency by `factor`. `llama3` divides only the slow ones and blends in
    between; its three further fields are as in Llama 3.1's `config.json`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or not math.isfinite(self.factor):
            raise ConfigError(f"RoPE scaling factor must be a number >= 1, got {self.factor}.")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                "llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and maths of one decoder-only transformer.

    Sizes in elements: `hidden_size` is D, `intermediate_size` F, `num_heads` N, `num_kv_heads` K,
    `head_dim` H, `num_layers` L, `vocab_size` V; `max_context` counts tokens (prompt and output).
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers")
        for name in (*sizes, "num_heads", "num_kv_heads", "head_dim", "max_context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} query heads "
                f"and {self.num_kv_heads} key/value heads."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}.")
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise ConfigError(
                f"rms_norm_eps and rope_theta must be positive, got {self.rms_norm_eps} and "
                f"{self.rope_theta}."
            )

    @property
    def queries_per_kv(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_params(self) -> int:
        """Number of weights, tied embeddings counted once."""
        heads = self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (heads + self.num_heads) * self.head_dim
        layer += 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        layer += heads * self.head_dim * self.qkv_bias + self.hidden_size * self.output_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        layer += 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Hugging Face `config.json` describes.

    Raises:
        ConfigError: an unsupported architecture, activation, attention or RoPE kind, a missing
        size,
            or a field this loader does not know (it might change the maths), always named.
    """
    fields = {name: value for name, value in raw.items() if value is not None}
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"Unsupported model_type {family!r}: supported are {', '.join(FAMILIES)} "
            "(Llama 3.x, Qwen2/2.5, dense Qwen3)."
        )
    reader = _FieldReader(fields)
    num_heads = reader.take("num_attention_heads", int)
    hidden_size = reader.take("hidden_size", int)
    rope_theta, rope_scaling = _read_rope(reader)
    config = ModelConfig(
        family=family,
        vocab_size=reader.take("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=reader.take("intermediate_size", int),
        num_layers=reader.take("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=reader.take("num_key_value_heads", int, num_heads),
        head_dim=reader.take(
            "head_dim", int, 128 if family == "qwen3" else max(1, hidden_size // max(1, num_heads))
        ),
        max_context=reader.take("max_position_embeddings", int),
        rms_norm_eps=reader.take("rms_norm_eps", float, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        # Qwen2 always has biases on q, k and v; the other two say so themselves.
        qkv_bias=reader.take("attention_bias", bool, False) or family == "qwen2",
        output_bias=family != "qwen2" and bool(fields.get("attention_bias", False)),
        mlp_bias=reader.take("mlp_bias", bool, False),
        qk_norm=family == "qwen3",
        tied_embeddings=reader.take("tie_word_embeddings", bool, False),
    )
    reader.require("hidden_act", "silu")
    reader.require("use_sliding_window", False)
    reader.require("partial_rotary_factor", 1.0)
    reader.take("sliding_window", int, 0)  # without use_sliding_window it has no effect
    layer_types = reader.take("layer_types", list, [])
    if any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(
            f"Unsupported layer_types {sorted(set(layer_types))}: only full_attention layers are "
            "implemented."
        )
    reader.refuse_unread()
    return config


def _read_rope(reader: "_FieldReader") -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    old_theta = reader.take("rope_theta", float, 10_000.0)
    parameters = dict(reader.take("rope_parameters", dict, {}))
    parameters = parameters or dict(reader.take("rope_scaling", dict, {}))
    rope = _FieldReader({name: value for name, value in parameters.items() if value is not None})
    theta = rope.take("rope_theta", float, old_theta)
    legacy_kind = rope.take("type", str, "default")
    kind = rope.take("rope_type", str, legacy_kind)
    rope.require("partial_rotary_factor", 1.0)
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling(kind="linear", factor=rope.take("factor", float))
    elif kind == "llama3":
        scaling = RopeScaling(
            kind="llama3",
            factor=rope.take("factor", float),
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
            original_max_context=rope.take("original_max_position_embeddings", int),
        )
    else:
        raise ConfigError(
            f"Unsupported RoPE type {kind!r}: supported are default, linear and llama3. If the "
            "checkpoint's config.json only offers it for long contexts, remove rope_scaling."
        )
    rope.refuse_unread(prefix="rope parameter ")
    return theta, scaling


class _FieldReader:
    """Reads fields one by one with their types and knows which were never read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._unread = set(fields) - _IRRELEVANT_FIELDS

    def take[T](self, name: str, kind: type[T], default: T | None = None) -> T:
        self._unread.discard(name)
        value = self._fields.get(name, default)
        if value is None:
            raise ConfigError(f"config.json lacks the field {name!r}, which the model needs.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"Field {name!r} of config.json must be of type {kind.__name__}, got {value!r}."
            )
        return value  # pyright: ignore[reportReturnType]

    def require(self, name: str, expected: object) -> None:
        self._unread.discard(name)
        value = self._fields.get(name, expected)
        if value != expected:
            raise ConfigError(
                f"Unsupported {name} = {value!r} in config.json: only {expected!r} is implemented."
            )

    def refuse_unread(self, prefix: str = "field ") -> None:
        if self._unread:
            names = ", ".join(f"{n} = {self._fields[n]!r}" for n in sorted(self._unread))
            raise ConfigError(
                f"config.json has {prefix}{names}, which this loader does not know and which may "
                "change what the model computes; remove it if you are sure that it does not."
            )
