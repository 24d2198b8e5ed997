"""Model configurations, read from a checkpoint's `config.json`.

`ModelConfig` is frozen and hashable, so it is a static argument of every jitted program. A field of
`config.json` is either understood, or has a value that does not touch the maths of inference, or is
refused by name (`config_fields.py`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from ssd_jax.config_fields import FieldReader, refuse_quantised
from ssd_jax.errors import ConfigError, shown
from ssd_jax.field_checks import MAX_FLOAT32, MAX_INT32, MIN_FLOAT32

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")
MAX_PARAMS = 2**48


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
        if not 1 <= self.factor <= MAX_FLOAT32:
            raise ConfigError(
                f"RoPE scaling factor must be a finite number >= 1, got {self.factor}."
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor <= MAX_FLOAT32:
            raise ConfigError(
                "llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor, all finite, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )
        if not 0 < self.original_max_context <= MAX_INT32:
            raise ConfigError(
                "original_max_position_embeddings must be a positive whole number below 2**31, got "
                f"{shown(self.original_max_context)}."
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
            if (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not (0 < value <= MAX_INT32)
            ):
                raise ConfigError(
                    f"{name} must be a positive whole number below 2**31, got {shown(value)}."
                )
        if self.num_params > MAX_PARAMS:
            raise ConfigError(
                f"vocab_size {self.vocab_size}, hidden_size {self.hidden_size}, intermediate_size "
                f"{self.intermediate_size} and num_layers {self.num_layers} give "
                f"{self.num_params:.1e} weights, more than any model has; correct them."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} query heads "
                f"and {self.num_kv_heads} key/value heads."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}.")
        if not MIN_FLOAT32 <= self.rms_norm_eps < 1:
            raise ConfigError(
                "rms_norm_eps must be a number above 0, in float32, and below 1, got "
                f"{self.rms_norm_eps}."
            )
        if not 1 <= self.rope_theta <= MAX_FLOAT32:
            raise ConfigError(
                f"rope_theta must be a finite number >= 1, in float32, got {self.rope_theta}."
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


@contextmanager
def _of_config_json() -> Iterator[None]:
    """Say of errors within which file they are about, where they do not say it."""
    try:
        yield
    except ConfigError as error:
        if "config.json" in str(error):
            raise
        raise ConfigError(f"config.json cannot be right: {error}") from error


@_of_config_json()
def model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Hugging Face `config.json` describes.

    Raises:
        ConfigError: an unsupported architecture, activation, attention or RoPE kind, a missing
            size, or a field this loader does not know (it might change the maths), always named.
    """
    family: Family | None = next((name for name in FAMILIES if raw.get("model_type") == name), None)
    if family is None:
        raise ConfigError(
            f"Unsupported model_type {shown(raw.get('model_type'))} in config.json: supported are "
            f"{', '.join(FAMILIES)} (Llama 3.x, Qwen2/2.5, dense Qwen3)."
        )
    refuse_quantised(raw)
    reader = FieldReader(raw)
    num_heads = reader.take_size("num_attention_heads")
    hidden_size = reader.take_size("hidden_size")
    max_context = reader.take_size("max_position_embeddings")
    rope_theta, rope_scaling = _read_rope(reader, max_context)
    config = ModelConfig(
        family=family,
        vocab_size=reader.take_size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.take_size("intermediate_size"),
        num_layers=reader.take_size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.take_size("num_key_value_heads", num_heads),
        head_dim=reader.take_size(
            "head_dim", 128 if family == "qwen3" else max(1, hidden_size // num_heads)
        ),
        max_context=max_context,
        rms_norm_eps=reader.take("rms_norm_eps", float, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        # Qwen2 always has biases on q, k and v; the other two say so themselves.
        qkv_bias=reader.take("attention_bias", bool, False) or family == "qwen2",
        output_bias=family != "qwen2" and reader.take("attention_bias", bool, False),
        mlp_bias=reader.take("mlp_bias", bool, False),
        qk_norm=family == "qwen3",
        tied_embeddings=reader.take("tie_word_embeddings", bool, False),
    )
    _refuse_windows(reader, config)
    reader.refuse_the_rest()
    return config


def _refuse_windows(reader: FieldReader, config: ModelConfig) -> None:
    """Raise if a layer attends through a window that is narrower than the context.

    As in transformers: `layer_types` decides where it is given, else the layers from
    `max_window_layers` on have the window, if `use_sliding_window` switches it on.
    """
    window = reader.take("sliding_window", int, config.max_context)
    first = reader.take("max_window_layers", int, 0 if config.family == "llama" else 28)
    is_on = reader.take("use_sliding_window", bool, False)
    kinds = reader.take("layer_types", list, [])
    for kind in kinds:
        if kind != "full_attention":
            raise ConfigError(
                f"Unsupported {shown(kind)} in layer_types of config.json: only 'full_attention' "
                "is implemented; run this checkpoint with transformers."
            )
    if is_on and not kinds and window < config.max_context and first < config.num_layers:
        raise ConfigError(
            f"Unsupported use_sliding_window = True in config.json, with sliding_window {window} "
            f"from layer {first} on: only full attention is implemented; run this checkpoint with "
            "transformers."
        )


def _read_rope(reader: FieldReader, max_context: int) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling.

    transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes both into `rope_parameters`;
    some files have both spellings, which must then agree.
    """
    old = _rope_fields(reader, "rope_scaling")
    new = _rope_fields(reader, "rope_parameters")
    kinds = {"rope_type": "default"}
    for name in sorted((old.keys() & new.keys()) | kinds.keys()) if old and new else ():
        one, other = old.get(name, kinds.get(name)), new.get(name, kinds.get(name))
        if one != other:
            raise ConfigError(
                f"rope_scaling and rope_parameters of config.json should agree, but {name[:60]} is "
                f"{shown(one)} in one and {shown(other)} in the other; remove the wrong one."
            )
    rope = FieldReader(new | old, "the RoPE parameters of config.json")
    theta = _agreeing(reader, rope, "rope_theta", float, 10_000.0)
    kind = rope.take("rope_type", str, "default")
    pretrained = _agreeing(reader, rope, "original_max_position_embeddings", int, max_context)
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
            original_max_context=pretrained,
        )
    else:
        raise ConfigError(
            f"Unsupported RoPE type {shown(kind)} in config.json: supported are default, linear "
            "and llama3. If it is only offered for long contexts, remove rope_scaling."
        )
    rope.refuse_the_rest(never_maths=frozenset())
    return theta, scaling


def _rope_fields(reader: FieldReader, name: str) -> dict[str, Any]:
    """The fields under one spelling; the kind of scaling goes by `type` in older files."""
    given = reader.take(name, dict, {})
    fields = {key: value for key, value in given.items() if value is not None}
    legacy_kind = fields.pop("type", None)
    if legacy_kind is not None and fields.setdefault("rope_type", legacy_kind) != legacy_kind:
        raise ConfigError(
            f"rope_type and type in {name} of config.json should agree, got "
            f"{shown(fields['rope_type'])} and {shown(legacy_kind)}; remove the wrong one."
        )
    return fields


def _agreeing[T](reader: FieldReader, rope: FieldReader, name: str, kind: type[T], default: T) -> T:
    """A field that may stand among the RoPE parameters, beside them, or with one value in both."""
    inside, outside = rope.take(name, kind, default), reader.take(name, kind, default)
    if name in rope and name in reader and inside != outside:
        raise ConfigError(
            f"{name} of config.json and {name} among its RoPE parameters should agree, got "
            f"{shown(outside)} and {shown(inside)}; remove the wrong one."
        )
    return inside if name in rope else outside
