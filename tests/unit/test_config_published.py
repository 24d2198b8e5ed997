"""Configs as their authors publish them, and fields judged by their values.

The sizes are facts of the model cards; each row is written here from those, not copied from a file.
"""

import pytest
from test_config import parse

from ssd_jax.config import RopeScaling, model_config_from_hf
from ssd_jax.config_fields import NEUTRAL_VALUES, NEVER_MATHS
from ssd_jax.errors import ConfigError

LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA31_ROPE,
    "torch_dtype": "bfloat16",
}
SMOLLM = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
LINEAR4 = {"factor": 4.0, "type": "linear"}
WINDOW_OFF = {"use_sliding_window": False, "attention_dropout": 0.0}
QWEN25 = WINDOW_OFF | {"sliding_window": 131072, "max_window_layers": 28, "rope_theta": 1000000.0}
MROPE_OFF = {"use_mrope": False, "sliding_window": 4096, "max_window_layers": 21}
QWEN3 = WINDOW_OFF | {
    "attention_bias": False,
    "head_dim": 128,
    "max_window_layers": 28,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
}

# family, name: vocabulary, model dim, feed-forward, layers, heads, kv heads, context, more fields
PUBLISHED = {
    ("llama", "Llama 2 7B"): (32000, 4096, 11008, 32, 32, 32, 4096, {"pretraining_tp": 1}),
    ("llama", "Llama 3.1 8B Instruct"): (128256, 4096, 14336, 32, 32, 8, 131072, LLAMA31),
    ("llama", "Llama 3.2 1B"): (
        *(128256, 2048, 8192, 16, 32, 8, 131072),
        LLAMA31
        | {"head_dim": 64, "tie_word_embeddings": True}
        | {"rope_scaling": LLAMA31_ROPE | {"factor": 32.0}},
    ),
    ("llama", "TinyLlama 1.1B"): (32000, 2048, 5632, 22, 32, 4, 2048, {"rope_scaling": None}),
    ("llama", "SmolLM 135M"): (49152, 576, 1536, 30, 9, 3, 2048, SMOLLM | {"rope_theta": 10000.0}),
    ("llama", "SmolLM2 135M Instruct"): (49152, 576, 1536, 30, 9, 3, 8192, SMOLLM),
    ("llama", "Vicuna 7B 16k"): (
        *(32000, 4096, 11008, 32, 32, 32, 4096),
        {"max_sequence_length": 16384, "rope_scaling": LINEAR4},
    ),
    ("llama", "Code Llama 7B"): (32016, 4096, 11008, 32, 32, 32, 16384, {"rope_theta": 1000000}),
    ("llama", "DeepSeek Coder 6.7B"): (
        *(32256, 4096, 11008, 32, 32, 32, 16384),
        {"rope_scaling": LINEAR4, "rope_theta": 100000},
    ),
    ("llama", "Yi 6B"): (64000, 4096, 11008, 32, 32, 4, 4096, {"rope_theta": 5000000.0}),
    ("qwen2", "Qwen1.5 0.5B"): (
        *(151936, 1024, 2816, 24, 16, 16, 32768),
        QWEN25 | {"sliding_window": 32768, "max_window_layers": 21, "tie_word_embeddings": True},
    ),
    ("qwen2", "Qwen2 0.5B"): (151936, 896, 4864, 24, 14, 2, 131072, QWEN25),
    ("qwen2", "Qwen2 7B"): (152064, 3584, 18944, 28, 28, 4, 131072, QWEN25),
    ("qwen2", "Qwen2.5 0.5B"): (151936, 896, 4864, 24, 14, 2, 32768, QWEN25 | {"use_mrope": False}),
    ("qwen2", "Qwen2.5 7B Instruct"): (152064, 3584, 18944, 28, 28, 4, 32768, QWEN25),
    ("qwen2", "Qwen2.5 72B"): (
        *(152064, 8192, 29568, 80, 64, 8, 131072),
        QWEN25 | {"max_window_layers": 80},
    ),
    ("qwen2", "Qwen2.5 Math 7B"): (
        *(152064, 3584, 18944, 28, 28, 4, 4096),
        QWEN25 | MROPE_OFF | {"rope_theta": 10000},
    ),
    ("qwen2", "Qwen2.5 Coder 1.5B"): (151936, 1536, 8960, 28, 12, 2, 32768, QWEN25),
    ("qwen2", "DeepSeek R1 Distill Qwen 1.5B"): (
        *(151936, 1536, 8960, 28, 12, 2, 131072),
        QWEN25 | MROPE_OFF | {"rope_theta": 10000},
    ),
    ("qwen2", "QwQ 32B"): (
        *(152064, 5120, 27648, 64, 40, 8, 40960),
        QWEN25 | {"sliding_window": 32768, "max_window_layers": 64},
    ),
    ("qwen3", "Qwen3 0.6B"): (151936, 1024, 3072, 28, 16, 8, 40960, QWEN3),
    ("qwen3", "Qwen3 0.6B Base"): (151936, 1024, 3072, 28, 16, 8, 32768, QWEN3),
    ("qwen3", "Qwen3 1.7B"): (151936, 2048, 6144, 28, 16, 8, 40960, QWEN3),
    ("qwen3", "Qwen3 4B"): (151936, 2560, 9728, 36, 32, 8, 40960, QWEN3),
    ("qwen3", "Qwen3 4B Instruct 2507"): (
        *(151936, 2560, 9728, 36, 32, 8, 262144),
        QWEN3 | {"rope_theta": 5000000, "max_window_layers": 36},
    ),
    ("qwen3", "Qwen3 8B"): (151936, 4096, 12288, 36, 32, 8, 40960, QWEN3),
    ("qwen3", "Qwen3 8B Base"): (151936, 4096, 12288, 36, 32, 8, 32768, QWEN3),
    ("qwen3", "Qwen3 14B"): (151936, 5120, 17408, 40, 40, 8, 40960, QWEN3),
    ("qwen3", "Qwen3 32B"): (151936, 5120, 25600, 64, 64, 8, 40960, QWEN3),
    ("qwen3", "Qwen3 Embedding 0.6B"): (151669, 1024, 3072, 28, 16, 8, 32768, QWEN3),
}
SIZE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)

# What transformers 4.51 and 5.24 hold or write without being asked: field, default, other value.
GENERIC = [
    ("add_cross_attention", False, True),
    ("attention_dropout", 0.0, 0.1),
    ("bad_words_ids", None, [[1]]),
    ("begin_suppress_tokens", None, [1]),
    ("chunk_size_feed_forward", 0, 2),
    ("cross_attention_hidden_size", None, 8),
    ("decoder_start_token_id", None, 1),
    ("diversity_penalty", 0.0, 1.0),
    ("do_sample", False, True),
    ("dtype", None, "bfloat16"),
    ("early_stopping", False, True),
    ("encoder_no_repeat_ngram_size", 0, 2),
    ("exponential_decay_length_penalty", None, [2, 1.5]),
    ("finetuning_task", None, "chat"),
    ("forced_bos_token_id", None, 1),
    ("forced_eos_token_id", None, 1),
    ("hidden_act", "silu", "gelu"),
    ("id2label", {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "yes"}),
    ("initializer_range", 0.02, 0.1),
    ("is_decoder", False, True),
    ("is_encoder_decoder", False, True),
    ("label2id", {"LABEL_0": 0, "LABEL_1": 1}, {"yes": 0}),
    ("length_penalty", 1.0, 2.0),
    ("max_length", 20, 100),
    ("max_window_layers", 28, 1),
    ("min_length", 0, 2),
    ("no_repeat_ngram_size", 0, 2),
    ("num_beam_groups", 1, 2),
    ("num_beams", 1, 2),
    ("num_labels", 2, 3),
    ("num_return_sequences", 1, 2),
    ("output_attentions", False, True),
    ("output_hidden_states", False, True),
    ("output_scores", False, True),
    ("pad_token_id", None, -1),
    ("per_layer_config", None, {"1": {"head_dim": 8}}),
    ("prefix", None, "x"),
    ("pretraining_tp", 1, 2),
    ("problem_type", None, "regression"),
    ("pruned_heads", {}, {"1": [0]}),
    ("remove_invalid_values", False, True),
    ("repetition_penalty", 1.0, 1.1),
    ("return_dict", True, False),
    ("return_dict_in_generate", False, True),
    ("sep_token_id", None, 1),
    ("sliding_window", 4096, 64),
    ("suppress_tokens", None, [1]),
    ("task_specific_params", None, {"chat": {}}),
    ("temperature", 1.0, 0.6),
    ("tf_legacy_loss", False, True),
    ("tie_encoder_decoder", False, True),
    ("tokenizer_class", None, "LlamaTokenizer"),
    ("top_k", 50, 20),
    ("top_p", 1.0, 0.9),
    ("torchscript", False, True),
    ("typical_p", 1.0, 0.9),
    ("use_bfloat16", False, True),
    ("use_cache", True, False),
    ("use_sliding_window", False, True),
]
CHANGES_THE_MATHS = {
    "add_cross_attention",
    "cross_attention_hidden_size",
    "hidden_act",
    "is_encoder_decoder",
    "per_layer_config",
    "pruned_heads",
}


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
def test_a_published_config_loads(family, name):
    *sizes, more = PUBLISHED[family, name]
    always = {"model_type": family, "hidden_act": "silu", "use_cache": True, "rms_norm_eps": 1e-6}
    config = model_config_from_hf(always | dict(zip(SIZE_FIELDS, sizes, strict=True)) | more)
    read = (
        *(config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers),
        *(config.num_heads, config.num_kv_heads, config.max_context),
    )
    assert read == tuple(sizes)
    assert config.rope_theta == more.get("rope_theta", 10_000.0)
    scaling = more.get("rope_scaling")
    assert (config.rope_scaling is None) == (scaling is None)
    if scaling is not None:
        assert isinstance(config.rope_scaling, RopeScaling)
        assert config.rope_scaling.factor == scaling["factor"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("field", "default", "other"), GENERIC)
def test_generic_fields_at_default_null_and_another_value(family, field, default, other):
    expected = parse(model_type=family)
    assert parse(model_type=family, **{field: default}) == expected
    assert parse(model_type=family, **{field: None}) == expected
    if field in CHANGES_THE_MATHS:
        with pytest.raises(ConfigError, match=rf"{field} = .*only .* is implemented"):
            parse(model_type=family, **{field: other})
    elif field != "use_sliding_window" or family != "llama":  # without a window: see below
        assert parse(model_type=family, **{field: other}) == expected


@pytest.mark.parametrize("field", sorted(NEUTRAL_VALUES))
def test_neutral_values_are_judged_with_their_kind(field):
    for value in NEUTRAL_VALUES[field]:
        assert parse(**{field: value}) == parse()
        if value in (0, 1):  # True is not 1, and 1 is not True
            with pytest.raises(ConfigError, match=field):
                parse(**{field: int(value) if isinstance(value, bool) else bool(value)})
    with pytest.raises(ConfigError, match=field):
        parse(**{field: 17})


def test_no_field_is_in_two_tables():
    assert not NEVER_MATHS & NEUTRAL_VALUES.keys()


WINDOW = {"use_sliding_window": True, "sliding_window": 128}


@pytest.mark.parametrize(
    "changes",
    [
        WINDOW | {"max_window_layers": 3},
        WINDOW | {"max_window_layers": 28},
        WINDOW | {"layer_types": ["full_attention"] * 3, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ],
)
def test_a_window_that_no_layer_is_in_changes_nothing(changes):
    assert parse(model_type="qwen2", **changes) == parse(model_type="qwen2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (WINDOW | {"max_window_layers": 2}, "sliding_window 128 from layer 2"),
        (WINDOW | {"max_window_layers": 0}, "use_sliding_window"),
        ({"layer_types": ["full_attention", ["x"], 5]}, "layer_types"),
        ({"layer_types": ["full_attention", None]}, "layer_types"),
    ],
)
def test_a_window_that_a_layer_is_in_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse(model_type="qwen2", **changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq', 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "'gptq', 8 bits"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "'fp8'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bits"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": "int8"}, "int8"),
    ],
)
def test_a_quantised_checkpoint_is_told_as_that(fields, words):
    with pytest.raises(ConfigError, match=rf"quantised.*{words}.*take the checkpoint"):
        parse(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None, "quantization": {}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": False}},
    ],
)
def test_quantisation_that_is_off_changes_nothing(fields):
    assert parse(**fields) == parse()


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 5000: "a" * 5000},
        {f"field_{i}": [["a" * 100] * 100] * 100 for i in range(300)},
        {"model_type": "a" * 5000},
        {"rope_scaling": {"rope_type": "a" * 5000}},
        {"hidden_size": 10**5000},
    ],
)
def test_messages_stay_short(fields):
    with pytest.raises(ConfigError) as caught:
        parse(**fields)
    assert len(str(caught.value)) < 800
