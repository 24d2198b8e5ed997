import dataclasses
import math

import pytest

from ssd_jax.errors import RequestError
from ssd_jax.sampling_params import SamplingParams

REFUSED = [
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", -0.5),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.0),
    ("min_p", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -math.inf),
    ("seed", -1),
    ("seed", 2**64),
    ("logprobs", -1),
    ("logprobs", 65),
    ("stop", ("a", "")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_makes_no_sense_is_refused_with_name_and_value(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name} must be ")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("bias", [{-1: 1.0}, {3: math.nan}, {3: math.inf}])
def test_logit_bias_is_checked_entry_by_entry(bias):
    with pytest.raises(RequestError, match="logit_bias must be") as caught:
        SamplingParams(logit_bias={5: 0.5} | bias)
    assert any(repr(number) in str(caught.value) for entry in bias.items() for number in entry)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"max_tokens": None, "temperature": 100.0, "top_k": 10**6, "top_p": 1e-9, "min_p": 0.999},
        {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"seed": 0, "logprobs": 0},
        {"seed": 2**64 - 1, "logprobs": 64},
        {"logit_bias": {0: -math.inf, 5: -100.0}, "stop": ("end",), "stop_token_ids": (1, 2)},
    ],
)
def test_limits_are_allowed(options):
    params = SamplingParams(**options)
    assert {name: getattr(params, name) for name in options} == options


def test_the_default_is_greedy_and_cannot_change():
    params = SamplingParams()
    assert (params.temperature, params.seed, params.max_tokens) == (0.0, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
