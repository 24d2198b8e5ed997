"""The fields of a Hugging Face `config.json`: which matter, and which values change nothing.

A field is judged by its value, not by its name. What is read has a place in `ModelConfig`; what
is `NEVER_MATHS` may hold anything; what is in `NEUTRAL_VALUES` may hold the values there, with
which the model computes what it would without the field. Null always means "not set".
"""

import math
from collections.abc import Mapping, Set
from typing import Any

from ssd_jax.errors import ConfigError, shown
from ssd_jax.field_checks import MAX_INT32

# How a model was trained, stored, or is sampled from: no value of these changes a logit.
# fmt: off
NEVER_MATHS = frozenset(
    [
        # names, versions, storage
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
        "_commit_hash", "_name_or_path", "architectures", "attn_implementation", "auto_map",
        "custom_pipelines", "dtype", "finetuning_task", "is_llama_config",
        "keys_to_ignore_at_inference", "model_type", "name_or_path", "tf_legacy_loss",
        "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
        "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16",
        # the order of computation, not its result
        "_flash_attn_2_enabled", "chunk_size_feed_forward", "pretraining_tp", "use_cache",
        "use_flash_attn", "use_flash_attention_2",
        # training
        "attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop",
        "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob", "initializer_range",
        "is_decoder", "resid_pdrop", "router_aux_loss_coef", "tie_encoder_decoder",
        # heads of other tasks, outputs beside the logits
        "id2label", "label2id", "num_labels", "output_attentions", "output_hidden_states",
        "output_scores", "prefix", "problem_type", "return_dict", "return_dict_in_generate",
        "task_specific_params",
        # lengths and ids that the tokenizer or the sampler reads; max_position_embeddings counts
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "max_sequence_length",
        "model_max_length", "pad_token_id", "sep_token_id", "seq_length",
        "tokenizer_model_max_length", "tokenizer_padding_side", "unk_token_id",
        # sampling
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
        "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
        "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "min_new_tokens", "no_repeat_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
        "remove_invalid_values", "repetition_penalty", "suppress_tokens", "target_lookbehind",
        "temperature", "top_k", "top_p", "typical_p",
    ]
)
# fmt: on

# Fields that switch or scale something this engine does not compute, and the values that do not.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_factor": (1,),
    "attention_multiplier": (),
    "attn_factor": (1,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "factor": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_only_layers": ([],),
    "mscale": (1,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
}

# Where the tools that quantise say so: transformers and its back ends, MLX, compressed-tensors.
QUANTISATION_FIELDS = ("quantization_config", "quantization", "compression_config")


class FieldReader:
    """Reads the fields of an object one by one with their types, and knows which were never read.

    Attributes:
        where: what the object is, for messages, such as "config.json" or "rope_scaling".
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json") -> None:
        self.where = where
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._unread = set(self._fields)

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def take[T](self, name: str, kind: type[T], default: T | None = None) -> T:
        """The field's value, which must be of that kind; a float may be written as an integer."""
        self._unread.discard(name)
        value = self._fields.get(name, default)
        if value is None:
            raise ConfigError(f"{self.where} lacks the field {name!r}, which the model needs.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf if value > 0 else -math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(
                f"Field {name!r} of {self.where} must be of type {kind.__name__}, got "
                f"{shown(value)}."
            )
        return value  # pyright: ignore[reportReturnType]

    def take_size(self, name: str, default: int | None = None) -> int:
        """The field's value, which must be a whole number above 0 that fits 32 bits."""
        value = self.take(name, int, default)
        if not 0 < value <= MAX_INT32:
            raise ConfigError(
                f"Field {name!r} of {self.where} must be a whole number above 0 and below 2**31, "
                f"got {shown(value)}."
            )
        return value

    def refuse_the_rest(self, never_maths: Set[str] = NEVER_MATHS) -> None:
        """Raise for what was not read, unless it changes nothing or is quantisation.

        Raises:
            ConfigError: naming the fields, their values and what is implemented.
        """
        for name in sorted(self._unread & NEUTRAL_VALUES.keys()):
            value, neutral = self._fields[name], NEUTRAL_VALUES[name]
            if not any(_is_same(value, other) for other in neutral):
                only = " or ".join(map(repr, neutral)) or "null"
                raise ConfigError(
                    f"Unsupported {name} = {shown(value)} in {self.where}: only {only} is "
                    "implemented; run this checkpoint with transformers."
                )
        known = NEUTRAL_VALUES.keys() | set(QUANTISATION_FIELDS)
        unknown = sorted(self._unread - never_maths - known)
        if unknown:
            listed = ", ".join(
                f"{n if n.isidentifier() and len(n) <= 60 else shown(n, 60)} = "
                f"{shown(self._fields[n], 60)}"
                for n in unknown[:2]
            )
            more = f" and {len(unknown) - 2} more" if len(unknown) > 2 else ""
            raise ConfigError(
                f"{self.where} has the field {listed}{more}, which this loader does not know and "
                "which may change what the model computes; remove it if you are sure that it does "
                "not."
            )


def refuse_quantised(fields: Mapping[str, Any]) -> None:
    """Raise if the checkpoint's weights are quantised.

    Raises:
        ConfigError: naming the method where the file does.
    """
    for name in QUANTISATION_FIELDS:
        value = fields.get(name)
        if value is None or value == {}:
            continue
        settings = value if isinstance(value, Mapping) else {}
        method = settings.get("quant_method", settings.get("mode"))
        if method == "bitsandbytes" and not (
            settings.get("load_in_4bit") or settings.get("load_in_8bit")
        ):
            continue
        details = [shown(method) if method is not None else "MLX" if name == "quantization" else ""]
        bits = settings.get("bits", settings.get("w_bit"))
        details.append(f"{shown(bits)} bits" if bits is not None else "")
        told = ", ".join(detail for detail in details if detail) or shown(value)
        raise ConfigError(
            f"This checkpoint is quantised ({name} in config.json: {told}), and only float32, "
            "float16 and bfloat16 weights are read; take the checkpoint that it was made from."
        )


def _is_same(value: object, neutral: object) -> bool:
    """Equality that tells True from 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
