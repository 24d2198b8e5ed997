import pytest

from ssd_jax.errors import CheckpointError
from ssd_jax.text.generation_config import recommended_sampling


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"eos_token_id": [1, 2], "transformers_version": "4.51.0"}, {}),
        (  # Qwen3
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        (  # Qwen2.5
            {
                "do_sample": True,
                "repetition_penalty": 1.05,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
            },
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        (
            {"do_sample": False, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": None, "temperature": None, "top_k": None}, {}),
        ({"top_k": -1, "min_p": 0.1}, {"temperature": 1.0, "top_k": 0, "min_p": 0.1}),
    ],
)
def test_what_published_files_ask_for(config, options):
    assert recommended_sampling(config).options == options
    assert recommended_sampling(config).unused == ()


def test_fields_without_a_counterpart_are_told():
    config = {"num_beams": 1, "typical_p": 0.9, "max_new_tokens": 2048, "bad_words_ids": None}
    assert recommended_sampling(config).unused == ("typical_p", "max_new_tokens")


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"do_sample": "yes"}, "do_sample in .* true or false, got 'yes'"),
        ({"temperature": "0.7"}, "temperature in .* number of at least 0 .*, got '0.7'"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": [0.9]}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"do_sample": False, "top_p": 7}, "top_p"),
        ({"temperature": 10**400}, "temperature"),
    ],
)
def test_malformed_values_name_field_and_file(config, fragment):
    with pytest.raises(CheckpointError, match=fragment) as caught:
        recommended_sampling(config)
    assert "generation_config.json" in str(caught.value)
    assert len(str(caught.value)) < 400
