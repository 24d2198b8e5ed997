import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_models import CONFIGS

from ssd_jax.config import ModelConfig, RopeScaling, model_config_from_hf
from ssd_jax.errors import ConfigError
from ssd_jax.models.init import abstract_params

SIZES = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def parse(**changes):
    """The configuration of `SIZES` with fields changed, or left out where the value is ...."""
    fields = SIZES | changes
    return model_config_from_hf({name: v for name, v in fields.items() if v is not ...})


def test_defaults_of_absent_fields():
    assert parse() == ModelConfig(
        family="llama",
        vocab_size=100,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=6,
        num_kv_heads=6,
        head_dim=4,
        max_context=512,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": 2}, {"num_kv_heads": 2, "queries_per_kv": 3}),
        ({"head_dim": 16}, {"head_dim": 16}),
        ({"model_type": "qwen3"}, {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
        ({"model_type": "qwen2"}, {"qkv_bias": True, "output_bias": False, "qk_norm": False}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        (
            {"model_type": "qwen3", "attention_bias": True},
            {"qkv_bias": True, "output_bias": True},
        ),
        ({"mlp_bias": True}, {"mlp_bias": True, "qkv_bias": False}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5}),
        ({"rope_theta": 500_000}, {"rope_theta": 500_000.0, "rope_scaling": None}),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {"rope_theta": 7.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
        ),
        (
            {"rope_scaling": LLAMA3_ROPE},
            {
                "rope_scaling": RopeScaling(
                    kind="llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_context=128,
                )
            },
        ),
    ],
)
def test_fields_that_matter_are_read(changes, expected):
    config = parse(**changes)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16", "transformers_version": "4.46.0"},
        {"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": False},
        {"architectures": ["LlamaForCausalLM"], "_name_or_path": "somewhere", "pretraining_tp": 1},
        {"hidden_act": "silu", "use_sliding_window": False, "max_window_layers": 28},
        {"sliding_window": 4096},
        {"sliding_window": None, "rope_scaling": None},
        {"layer_types": ["full_attention"] * 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fields_that_change_nothing_are_accepted(changes):
    assert parse(**changes) == parse()


THETA = {"rope_theta": 7.0}
BOTH = {"rope_scaling": LLAMA3_ROPE, "rope_theta": 7.0}


@pytest.mark.parametrize(
    "changes",
    [
        BOTH,
        {"rope_parameters": LLAMA3_ROPE | THETA},
        BOTH | {"rope_parameters": LLAMA3_ROPE | THETA},
        BOTH | {"rope_parameters": THETA | {"rope_type": "llama3"}},
        BOTH | {"rope_scaling": LLAMA3_ROPE | {"type": "llama3"}},
        THETA | {"rope_parameters": LLAMA3_ROPE},
        BOTH | {"original_max_position_embeddings": 128},
        BOTH | {"rope_parameters": LLAMA3_ROPE | {"factor": 8, "mscale": None}},
    ],
)
def test_rope_in_either_spelling_or_in_both(changes):
    config = parse(**changes)
    assert config.rope_theta == 7.0
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_context=128)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (BOTH | {"rope_parameters": LLAMA3_ROPE | {"factor": 4.0}}, "factor is 8.0 .* 4.0"),
        (BOTH | {"rope_parameters": {"rope_theta": 9.0}}, "rope_type is 'llama3' .* 'default'"),
        (BOTH | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 9.0}}, "7.0 and 9.0"),
        (BOTH | {"rope_scaling": LLAMA3_ROPE | {"type": "linear"}}, "'llama3' and 'linear'"),
        (BOTH | {"original_max_position_embeddings": 64}, "64 and 128"),
        (THETA | {"rope_parameters": {"rope_theta": 8}}, "7.0 and 8.0"),
    ],
)
def test_spellings_that_disagree_are_both_named(changes, words):
    with pytest.raises(ConfigError, match=rf"should agree.*{words}.*remove the wrong one"):
        parse(**changes)


@pytest.mark.parametrize("beside", [512, 96])
def test_llama3_scaling_takes_the_pretrained_length_from_beside_it(beside):
    """As transformers: from the field beside the parameters, else the context."""
    inner = {name: v for name, v in LLAMA3_ROPE.items() if not name.startswith("original")}
    outer = {} if beside == 512 else {"original_max_position_embeddings": beside}
    for field in ("rope_scaling", "rope_parameters"):
        scaling = parse(**{field: inner}, **outer).rope_scaling
        assert scaling is not None
        assert scaling.original_max_context == beside


REFUSED = [
    ({"model_type": "mixtral"}, ["model_type", "'mixtral'"]),
    ({"model_type": "qwen3_moe"}, ["model_type", "'qwen3_moe'"]),
    ({"model_type": ...}, ["model_type"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["RoPE", "'yarn'"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["RoPE", "'dynamic'"]),
    ({"rope_parameters": {"rope_type": "longrope"}}, ["RoPE", "'longrope'"]),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": 0.5}}, ["factor", "0.5"]),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": math.nan}}, ["factor", "nan"]),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, ["high_freq_factor", "1.0"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
    ({"rope_scaling": {"rope_type": "linear"}}, ["factor"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 3}}, ["mscale", "3"]),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ({"rope_theta": -1.0}, ["rope_theta", "-1.0"]),
    ({"rope_theta": 0.5}, ["rope_theta", "0.5"]),
    ({"rope_theta": math.inf}, ["rope_theta", "inf"]),
    ({"rope_theta": math.nan}, ["rope_theta", "nan"]),
    ({"rope_theta": 10**400}, ["rope_theta", "inf"]),
    ({"rope_theta": 1e39}, ["rope_theta", "1e+39"]),
    ({"rms_norm_eps": math.inf}, ["rms_norm_eps", "inf"]),
    ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "nan"]),
    ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "inf"]),
    ({"rms_norm_eps": 2}, ["rms_norm_eps", "2.0"]),
    ({"rms_norm_eps": 1e-50}, ["rms_norm_eps", "1e-50"]),
    ({"rope_scaling": LLAMA3_ROPE | {"factor": math.inf}}, ["factor", "inf"]),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": math.inf}}, ["high_freq", "inf"]),
    ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": math.nan}}, ["low_freq_factor", "nan"]),
    *(
        (
            {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": length}},
            ["original_max_position_embeddings"],
        )
        for length in (0, -5, 10**12)
    ),
    ({"max_position_embeddings": 10**12}, ["max_position_embeddings", "1000000000000"]),
    ({"hidden_size": 10**80}, ["hidden_size"]),
    ({"num_hidden_layers": 2**31 - 1, "hidden_size": 2**20}, ["weights"]),
    ({"rms_norm_eps": 0.0}, ["rms_norm_eps", "0.0"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
    ({"use_sliding_window": True, "sliding_window": 128}, ["use_sliding_window", "True"]),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types", "sliding_attention"],
    ),
    ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
    ({"logit_scale": 0.5}, ["logit_scale", "0.5"]),
    ({"hidden_size": ...}, ["'hidden_size'"]),
    ({"max_position_embeddings": None}, ["'max_position_embeddings'"]),
    ({"hidden_size": "24"}, ["'hidden_size'", "int", "'24'"]),
    ({"num_hidden_layers": 3.0}, ["'num_hidden_layers'", "int", "3.0"]),
    ({"vocab_size": True}, ["'vocab_size'", "int", "True"]),
    ({"tie_word_embeddings": 1}, ["'tie_word_embeddings'", "bool", "1"]),
    ({"rope_scaling": "llama3"}, ["'rope_scaling'", "dict", "'llama3'"]),
    ({"layer_types": "full_attention"}, ["'layer_types'", "list"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
    ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    ({"num_key_value_heads": 4}, ["num_kv_heads", "6", "4"]),
    ({"head_dim": 5}, ["head_dim", "5"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_not_supported_is_named(changes, words):
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    for word in words:
        assert word in str(caught.value)


def test_all_unknown_fields_are_named_at_once():
    with pytest.raises(ConfigError, match=r"alpha = 1.*beta = 2"):
        parse(beta=2, alpha=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_num_params_counts_the_weights(name):
    config = CONFIGS[name]
    leaves = jax.tree.leaves(abstract_params(config, np.float32))
    assert config.num_params == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    "flag", ["qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tied_embeddings"]
)
def test_num_params_with_one_flag(flag):
    config = dataclasses.replace(CONFIGS["llama"], **{flag: True})
    leaves = jax.tree.leaves(abstract_params(config, np.float32))
    assert config.num_params == sum(leaf.size for leaf in leaves)


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIGS["llama"].num_layers = 3
