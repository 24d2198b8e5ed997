"""Options and prompts of every wrong kind, in Python: taken exactly as asked, or one sentence.

An input is one call with one or two odd values in it. It must end in arrays that hold what was
asked for, or in an error of ours of fewer than 400 characters that names what is wrong.
"""

import collections
import dataclasses
import decimal
import fractions
import math
import random
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_cases import LONGEST_MESSAGE, SLOW_COUNT, Odd, numbered
from speculation_cases import tokenized
from tiny_models import tiny

from ssd_jax.decoding.finish import Finish
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import SsdJaxError
from ssd_jax.fan_out import FanOut
from ssd_jax.generation import choose_method, generate
from ssd_jax.sampling_params import SMALLEST_TEMPERATURE, SamplingParams

MODEL, BARE = tokenized(), tiny("qwen3").model
VOCABULARY, CONTEXT = MODEL.config.vocab_size, MODEL.config.max_context


def nested(depth):
    value = [1]
    for _ in range(depth):
        value = [value]
    return value


def endless():
    value = []
    value.append(value)
    return value


NUMBERS = [
    *(-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 3, 5, 8, 63, 64, 65, 2**24 + 1, 2**31 - 1, 2**31),
    *(2**32, 2**40, 2**63, 2**64 - 1, 2**64, 10**39, 10**400, 10**5000),
    *(-0.0, 0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 4.0, 1e-5, 1e-6, 1e-46, 1e-320, 1e39, 1e300, -1e39),
    *(math.nan, math.inf, -math.inf, 3.4028235e38, 3.4028236e38, 1 + 2j),
    *(decimal.Decimal("0.5"), fractions.Fraction(1, 2), Finish.LENGTH),
    *(np.int8(3), np.int64(2**40), np.uint64(2**63), np.float16(0.5), np.float32(0.25)),
    *(np.float64(1e300), np.float64(math.nan), np.bool_(True), jnp.int32(4), jnp.float32(0.5)),
    *(np.longdouble(0.5), np.datetime64("2020-01-01"), np.array(3), np.array([3]), np.array(0.5)),
]
TEXTS = [
    *("", " ", "a", "He", "3", "0.5", "-1", "1e3", "nan", "None", "True", "auto", "\0", "\ud800"),
    *("a\udfffb", "é", "日本", "coupled", "rejection", "greedy", "Coupled", "simple", "map", "mod"),
    *("neural", "ngram", "</s>", "a</s>", "x" * 5000, b"a", bytearray(b"a"), memoryview(b"ab")),
    *(collections.UserString("a"), np.str_("a"), np.bytes_(b"a")),
]
CONTAINERS = [
    *([], (), {}, set(), frozenset({1}), [1], [1, 2], (3, 4, 5), [[1]], [[1], [2, 3]], {1, 2}),
    *(["a"], ["a", ""], ["a", None], ["\ud800"], [b"a"], [None], [True], [1.0], [0.5, 1], [1, "2"]),
    *([math.nan], [1e39], [2**31], [10**400], [-1], [VOCABULARY], [VOCABULARY - 1], [[True]]),
    *({1: 2}, {1: -math.inf}, {1: math.inf}, {1: math.nan}, {1: 1e39}, {1: None}, {1: "2"}),
    *({"1": 2}, {1.0: 2.0}, {True: 1.0}, {-1: 0.5}, {VOCABULARY: 1.0}, {2**31: 1.0}, {"a": {}}),
    *(collections.OrderedDict({3: 1.5}), types.MappingProxyType({3: 1.5}), range(3), range(2**40)),
    *(collections.deque([1, 2]), np.arange(3), np.ones(2), np.ones((2, 2)), np.array(["a", "b"])),
    *(np.array([], np.int32), np.array([None]), np.array([1, "a"], object), jnp.arange(2)),
    *(nested(50), nested(5000), endless(), [0] * (CONTEXT + 1), [5] * 2000, iter([1]), "ab".split),
]
OBJECTS = [
    *(None, True, False, ..., NotImplemented, object(), Odd(), print, int, type, mock.MagicMock()),
    *(MODEL, BARE, NgramConfig(), SamplingParams(), [SamplingParams()], math, lambda: 1),
    *(FanOut(after_hit=(1, 1), after_miss=(1, 0)), FanOut(after_hit=(1,) * 5, after_miss=(2,) * 5)),
    *(RoundTimes(seconds=((1.0,) * 5,)), RoundTimes(seconds=((1.0,),)), Speculation(draft=BARE)),
]
USUAL = [
    *(1, 2, 4, 8, 64, 0.25, 0.9, 1.0, None, True, False, "a", "coupled", "greedy", "ngram", "map"),
    *(("a",), ("a", "He"), (3,), [3, 5], {3: -1.0}, {3: 2, 5: -math.inf}, (1, 1, 1, 1, 1), (1, 2)),
]
KINDS = [NUMBERS, NUMBERS, TEXTS, CONTAINERS, OBJECTS, USUAL, USUAL]
CLASSES = {
    SamplingParams: {},
    NgramConfig: {},
    Speculation: {"draft": MODEL},
    SSD: {"draft": MODEL},
    FanOut: {"after_hit": (1, 1), "after_miss": (1, 1)},
    RoundTimes: {"seconds": ((1.0,),)},
}
PROMPTS = [["Hello"], [[5]], [(5, 6)], ["a", "th"], [[5], [6], [7]], [np.arange(4)]]


def odd(rng):
    return rng.choice(rng.choice(KINDS))


def told(call, names):
    """What the call gives, or None if it was refused by a good sentence."""
    try:
        return call()
    except SsdJaxError as error:
        message = str(error)
        assert len(message) < LONGEST_MESSAGE, message
        assert message.endswith((".", "?")), message
        words = message.lower().replace("-", "_").replace(" ", "_")
        assert any(name in words for name in names), f"{names} in {message}"
        return None


def assert_taken(asked, kept, where):
    """`kept` is what was asked for: no value read as another kind's."""
    if isinstance(asked, np.ndarray | np.generic | jnp.ndarray):
        asked = asked.tolist()
    if asked is None or isinstance(asked, bool) or isinstance(kept, bool):
        assert asked is kept, where
    elif isinstance(kept, str):
        assert isinstance(asked, str), where
        assert asked == kept, where
    elif isinstance(kept, int | float):
        assert not isinstance(asked, str | bytes), where
        assert asked == kept or float(asked) == kept, where  # a device rounds numbers anyway
        assert isinstance(kept, int) or not math.isnan(kept), where
    elif isinstance(kept, dict):
        assert [*asked] == [*kept], where
        for key, value in kept.items():
            assert not any(isinstance(name, bool | float) for name in asked), where
            assert_taken(asked[key], value, where)
    elif isinstance(kept, tuple):
        assert not isinstance(asked, str | bytes | bytearray | memoryview | set | dict), where
        assert len(asked) == len(kept), where
        for one, other in zip(asked, kept, strict=True):
            assert_taken(one, other, where)
    else:
        assert asked is kept, where


def assert_options(options, asked):
    for name, value in asked.items():
        kept = getattr(options, name)
        where = f"{type(options).__name__}.{name}"
        if isinstance(value, np.ndarray | np.generic | jnp.ndarray):
            value = value.tolist()
        if name == "stop" and isinstance(value, str):
            value = (str(value),)
        if name == "temperature" and kept == 0:
            assert 0 <= value < SMALLEST_TEMPERATURE
        elif name == "fan_out" and not isinstance(value, FanOut):
            assert kept.after_hit == kept.after_miss
            if isinstance(value, int):
                assert set(kept.after_hit) == {value}
                assert not isinstance(value, bool)
            else:
                assert_taken(value, kept.after_hit, where)
        else:
            assert_taken(value, kept, where)


def make_options(rng):
    """A call that makes options with one to three odd fields, and what it asks for."""
    cls = rng.choice([SamplingParams, SamplingParams, *CLASSES])
    names = [field.name for field in dataclasses.fields(cls)]
    asked = {
        name: odd(rng) for name in rng.sample(names, min(len(names), rng.choice([1, 1, 2, 3])))
    }
    return cls, {**CLASSES[cls], **asked}, asked


def check_options(rng):
    cls, arguments, asked = make_options(rng)
    names = [*asked, *(["drafts"] if cls is Speculation else [])]
    options = told(lambda: cls(**arguments), names)
    if options is None:
        return None
    assert_options(options, asked)
    return options


def check_request(rng, options):
    """The options in use: the batch that would be decoded holds them."""
    prompts, params, speculation = rng.choice(PROMPTS), SamplingParams(seed=1), None
    if isinstance(options, SamplingParams):
        params = options
    elif isinstance(options, NgramConfig):
        speculation = Speculation(ngram=options)
    elif isinstance(options, Speculation | SSD):
        speculation = options
    else:
        return None
    names = [
        *(field.name for field in dataclasses.fields(params)),
        *("prompt", "stop_string", "vocabulary", "draft", "fan_out", "temperature"),
    ]
    made = told(lambda: make_requests(MODEL, prompts, params), names)
    made = made and told(lambda: choose_method(MODEL, made, speculation), names)
    if made is None:
        return None
    _, batch = made
    for row in range(len(prompts)):
        for name in ("temperature", "top_k", "top_p", "min_p", "presence_penalty"):
            held = np.asarray(getattr(batch.sampling, name))[row]
            assert held == np.asarray(getattr(params, name), held.dtype)
        for token, bias in params.logit_bias.items():
            held = np.asarray(batch.sampling.logit_bias)[row, token]
            assert held == np.float32(bias) or token in MODEL.unknown_ids
        assert set(params.stop_token_ids) <= set(np.asarray(batch.sampling.eos_ids)[row].tolist())
    return params


def check_prompts(rng):
    """Prompts, options or a speculation of the wrong kind, and lists of unequal lengths."""
    model = rng.choice([MODEL, MODEL, BARE])
    prompts, params, speculation = rng.choice(PROMPTS), SamplingParams(max_tokens=2), None
    names = ["prompt", "text", "tokenizer", "token_id"]
    match rng.randrange(6):
        case 0:
            prompts = odd(rng)
        case 1:
            prompts = [odd(rng)]
        case 2:
            prompts = [[5], odd(rng)]
        case 3:
            prompts = [[odd(rng), 5]]
        case 4:
            params = [params] * rng.randrange(4) if rng.random() < 0.5 else odd(rng)
            names += ["params", "samplingparams"]
        case 5:
            speculation = odd(rng)
            names += ["speculation", "draft", "vocabulary"]
    requests = told(lambda: make_requests(model, prompts, params), names)
    made = requests and told(lambda: choose_method(model, requests, speculation), names)
    if made is None:
        return
    assert len(requests) == len(prompts)
    for prompt, request in zip(prompts, requests, strict=True):
        if isinstance(prompt, str):
            assert request.prompt_ids == tuple(MODEL.tokenizer.encode(prompt))
        else:
            assert_taken(prompt, request.prompt_ids, "prompt")
    assert isinstance(params, SamplingParams) or len(params) == len(prompts)
    assert speculation is None or isinstance(speculation, Speculation | SSD)


def run(default_count):
    """How many inputs were taken, and the sampling options among them."""
    taken = []
    for number in numbered(default_count):
        rng = random.Random(number)
        try:
            if rng.random() < 0.3:
                check_prompts(rng)
                continue
            options = check_options(rng)
            params = None if options is None else check_request(rng, options)
            if params is not None:
                taken.append(params)
        except Exception as error:
            error.add_note(f"input {number}")
            raise
    return taken


def decode(taken):
    """What was taken decodes too, 32 rows at a time."""
    for start in range(0, len(taken), 32):
        rows = [
            dataclasses.replace(params, max_tokens=3, logprobs=None, stop=(), stop_token_ids=())
            for params in taken[start : start + 32]
        ]
        rows += [SamplingParams(max_tokens=3)] * (32 - len(rows))
        for completion in generate(MODEL, [[5, 6]] * 32, rows):
            assert len(completion.token_ids) == 3 or completion.finish_reason in ("eos", "error")


def test_odd_options_and_prompts():
    decode(run(300)[:32])


@pytest.mark.slow
def test_ten_thousand_odd_options_and_prompts():
    decode(run(SLOW_COUNT))


@pytest.mark.parametrize("numbers", [range(2**40), range(2**70), memoryview(b"ab")])
def test_what_only_looks_like_a_list_of_numbers_is_refused_at_once(numbers):
    with pytest.raises(SsdJaxError, match="stop_token_ids must be a list"):
        SamplingParams(stop_token_ids=numbers)
    with pytest.raises(SsdJaxError, match="prompts must be a list"):
        generate(MODEL, [numbers])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([64], {}, "ids of a prompt must be from 0 to 63"),
        ([1], {"logit_bias": {64: 1.0}}, "ids of logit_bias must be from 0 to 63"),
        ([1], {"stop_token_ids": (64,)}, "ids of stop_token_ids must be from 0 to 63"),
    ],
)
def test_an_id_outside_the_vocabulary_is_told_with_its_option(prompt, options, words):
    with pytest.raises(SsdJaxError, match=words):
        generate(MODEL, [prompt], SamplingParams(**options))
