"""Every option against values of every kind: taken as what it is declared, or one sentence."""

import dataclasses
import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_cases import Odd
from tiny_models import tiny

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import RequestError, shown
from ssd_jax.fan_out import FanOut
from ssd_jax.field_checks import MAX_FLOAT32
from ssd_jax.generation import generate
from ssd_jax.sampling_params import SamplingParams


def named(value):
    """A name of a test, the same in every process: without where an object lies."""
    return re.sub(" at 0x[0-9a-f]+", "", shown(value))


MODEL = tiny("qwen3").model
ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**40, 2**64, 10**400, 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 4.0, 1e39, 1e-46, 1e300, math.nan, math.inf, -math.inf),
    *("", "a", "3", "coupled", "\ud800", b"bytes", [], (), [1], ["a"], ["\ud800"], [True], [1.0]),
    *({}, {1: 2}, {"3": -1.0}, {5: 1e39}, {5: None}, {True: 1.0}, {1}, object(), Odd(), print),
    *(np.float64(0.5), np.int64(3), np.bool_(True), np.arange(3), np.ones(2), SamplingParams()),
]
CLASSES = [
    (SamplingParams, {}),
    (NgramConfig, {}),
    (Speculation, {"draft": MODEL}),
    (SSD, {"draft": MODEL}),
    (FanOut, {"after_hit": (1, 1), "after_miss": (1, 1)}),
    (RoundTimes, {"seconds": ((1.0,),)}),
]
FIELDS = [(cls, base, field.name) for cls, base in CLASSES for field in dataclasses.fields(cls)]


def numbers_in(value):
    """All numbers of a value, however deep."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return itertools.chain.from_iterable(map(numbers_in, value))
    return [value] if isinstance(value, (bool, int, float, np.generic)) else []


@pytest.mark.parametrize(
    ("cls", "base", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, _, name in FIELDS]
)
def test_any_value_is_taken_as_declared_or_refused_in_one_sentence(cls, base, name):
    for value in ODD_VALUES:
        refused = None
        try:
            options = cls(**{**base, name: value})
        except RequestError as error:
            refused = str(error)
        if refused is not None:
            assert len(refused) < 600
            assert refused.endswith(".")
            continue
        default = getattr(cls(**base), name)
        kept = getattr(options, name)
        for number in numbers_in(kept):
            assert type(number) in (bool, int, float)
            assert isinstance(number, bool) == isinstance(default, bool)
            assert name == "seed" or not abs(number) > MAX_FLOAT32 or math.isinf(number)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_tokens", 4.0, "a whole number of at least 1 or None, got 4.0."),
        ("max_tokens", True, "a whole number of at least 1 or None, got True."),
        ("max_tokens", 2**31, "got 2147483648."),
        ("max_tokens", "5", "got '5'."),
        ("top_k", 2**31, "from 0 to 2147483647 (0 is off), got 2147483648."),
        ("temperature", 1e39, "a finite float32 number of at least 0 (0 is greedy), got 1e+39."),
        ("repetition_penalty", 1e-46, "above 0 (1 is off), got 1e-46."),
        ("logit_bias", {"3": -100.0}, "got '3' in {'3': -100.0}."),
        ("logit_bias", {3: 1e39}, "got 1e+39 in {3: 1e+39}."),
        ("stop", ("a", "\ud800"), r"got '\ud800' in ('a', '\ud800')."),
        ("stop_token_ids", 5, "a list of which each is a whole number from 0 to 2147483647, got 5"),
        ("ignore_eos", 1, "True or False, got 1."),
        ("seed", 10**5000, "got a value of type int."),
    ],
    ids=named,
)
def test_the_sentence_says_what_was_expected_and_what_came(name, value, words):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name} must be ")
    assert words in str(caught.value)


def test_neighbouring_types_that_mean_the_same_are_taken():
    params = SamplingParams(
        stop="cd", stop_token_ids=np.array([1, 2]), max_tokens=np.int32(4), temperature=1
    )
    assert params == SamplingParams(
        stop=("cd",), stop_token_ids=(1, 2), max_tokens=4, temperature=1.0
    )
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(top_p=np.float32(0.5), min_p=jnp.float32(0.25)).min_p == 0.25
    assert SSD(draft=MODEL, draft_len=1, fan_out=np.array([2, 1])).fan_out.after_hit == (2, 1)


def test_the_smallest_temperatures_are_greedy():
    assert SamplingParams(temperature=1e-300).temperature == 0.0
    assert SamplingParams(temperature=1e-6).temperature == 0.0
    assert SamplingParams(temperature=1e-5).temperature == 1e-5


def test_what_is_kept_does_not_follow_the_callers_own():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = math.nan
    assert params.logit_bias == {3: 1.0}


@pytest.mark.parametrize(
    "prompts",
    [
        *(5, None, [None], [5], [[[5]]], [[math.inf]], [[1.5]], [["a"]], [["5"]], [[5, 1.0]]),
        *([{5: 1}], [{5}], [[True]], [b"bytes"], {"a": 1}, {"a"}, b"ab", ["\ud800"], [[10**400]]),
        *([np.ones(2)], Odd(), [Odd()], [[2**40]]),
    ],
    ids=named,
)
def test_prompts_are_texts_or_lists_of_ids(prompts):
    with pytest.raises(RequestError, match=r"^(prompts must be|This model has no tokenizer)"):
        generate(MODEL, prompts, SamplingParams(max_tokens=1))


def test_prompts_may_be_arrays_and_ranges():
    params = SamplingParams(max_tokens=2)
    plain = generate(MODEL, [[0, 1, 2]], params)
    for prompts in (np.arange(3)[None], jnp.arange(3)[None], ([0, 1, 2],), [range(3)]):
        assert generate(MODEL, prompts, params)[0].token_ids == plain[0].token_ids


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("model", {"model": "demo"}),
        ("params", {"params": {"max_tokens": 4}}),
        ("params", {"params": [None]}),
        ("speculation", {"speculation": "draft"}),
        ("speculation", {"speculation": MODEL}),
    ],
)
def test_whatever_else_is_passed_is_checked_too(name, arguments):
    call = {"model": MODEL, "prompts": [[1]], "params": SamplingParams(max_tokens=1), **arguments}
    with pytest.raises(RequestError, match=f"^{name} must be "):
        generate(call.pop("model"), call.pop("prompts"), call.pop("params"), **call)
