"""Every sampling option under every method: it works as in plain decoding, or is refused by name.

One batch holds every option at a value other than the rest's, a row each. Under coupled and greedy
verification each row must be what plain decoding gives. Under rejection it must be so where the law
leaves one choice (top_k 1), and must respect the option where it does not.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from speculation_cases import assert_same_outputs, with_times
from tiny_models import CONFIGS, make_tiny, perturbed, prompt_ids, tiny_tokenizer

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.errors import RequestError
from ssd_jax.generation import generate
from ssd_jax.sampling_params import SamplingParams

PROMPT = prompt_ids(5, seed=4) * 3
BASE = SamplingParams(max_tokens=24, temperature=0.8, seed=11)
ROWS = 16


@functools.cache
def pair():
    """A target whose greedy output ends in EOS, and a draft for it."""
    config = dataclasses.replace(CONFIGS["llama"], num_layers=1)
    model = dataclasses.replace(make_tiny(config).model, tokenizer=tiny_tokenizer())
    (output,) = generate(model, [PROMPT], certain(BASE))
    said = output.token_ids
    end = next(token for place, token in enumerate(said) if place == said.index(token) >= 8)
    model = dataclasses.replace(model, tokenizer=tiny_tokenizer((end,)))
    return model, perturbed(model, 0.1)


def certain(params):
    """The options with a law that leaves one choice."""
    return dataclasses.replace(params, top_k=1)


@functools.cache
def plain(options):
    return generate(pair()[0], [PROMPT] * len(options), list(map(as_params, options)))


def as_params(frozen):
    """Options from hashable (name, value) pairs; a logit bias is a tuple of pairs."""
    values = {name: dict(value) if name == "logit_bias" else value for name, value in frozen}
    return dataclasses.replace(BASE, **values)


def first_tokens():
    """What decoding without any option says, greedily."""
    return plain(((("top_k", 1),),))[0]


def cases():
    """Field of SamplingParams -> a value other than that of `BASE`."""
    said = first_tokens()
    return {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_k": 1,
        "top_p": 1e-6,
        "min_p": 0.999,
        "repetition_penalty": 1.8,
        "presence_penalty": 4.0,
        "frequency_penalty": 4.0,
        "logit_bias": ((said.token_ids[0], -np.inf), (said.token_ids[1], -np.inf)),
        "seed": 12,
        "stop": (said.text[3:5],),
        "stop_token_ids": (said.token_ids[4],),
        "ignore_eos": True,
        "logprobs": 2,
    }


def respects(name, value, completion):
    """Whether an output of a law with many choices is one that the option allows."""
    ids, reason = completion.token_ids, completion.finish_reason
    match name:
        case "max_tokens":
            return len(ids) == value or (len(ids) < value and reason == "eos")
        case "temperature" | "top_k" | "top_p" | "min_p":  # all of them leave one choice here
            return ids == first_tokens().token_ids
        case "logit_bias":
            return not set(ids) & {token for token, _ in value}
        case "stop":
            return value[0] not in completion.text
        case "stop_token_ids":
            return not set(ids[:-1]) & set(value)
        case "ignore_eos":
            return len(ids) == BASE.max_tokens
        case "logprobs":
            return [len(entry.top) for entry in completion.logprobs] == [value] * len(ids)
        case "seed":
            return completion.seed == value
        case "repetition_penalty" | "presence_penalty" | "frequency_penalty":
            return len(set(ids)) >= 0.6 * len(ids)  # hardly any token comes again
    raise ValueError(name)


def test_every_option_is_in_the_matrix_and_makes_a_difference():
    values = cases()
    assert set(values) == {field.name for field in dataclasses.fields(SamplingParams)}
    for name, value in values.items():
        assert value != getattr(BASE, name)
        if name == "logprobs":
            continue
        base = () if name in ("temperature", "top_k", "top_p", "min_p", "seed") else (("top_k", 1),)
        without, with_it = plain((base,)), plain(((*base, (name, value)),))
        assert without[0].token_ids != with_it[0].token_ids, name


METHODS = ("ar", "draft", "simple", "map", "mod", "combined")
VERIFICATIONS = ("coupled", "rejection", "greedy")
MODES = ("plain", "exact", "round_times")
EVERY = list(itertools.product(METHODS, VERIFICATIONS, MODES))
FAST = {
    ("ar", "coupled", "exact"),
    ("draft", "greedy", "plain"),
    ("simple", "rejection", "exact"),
    ("mod", "coupled", "round_times"),
    ("combined", "rejection", "plain"),
}


def speculation_of(method, verification, mode):
    draft = pair()[1] if method in ("draft", "combined") else None
    kind = {"combined": "simple", "ar": None, "draft": None}.get(method, method)
    ngram = kind and NgramConfig(kind=kind, n=2, max_draft=4, table_size=1 << 10)
    speculation = Speculation(
        draft=draft, ngram=ngram, verification=verification, exact=mode == "exact"
    )
    if mode == "round_times":
        costs = [lambda count: 1 + 0.1 * count] * len(speculation.drafter.names)
        return with_times(speculation, *costs)
    return speculation


@pytest.mark.parametrize(
    ("method", "verification", "mode"),
    [
        pytest.param(*each, marks=() if each in FAST else pytest.mark.slow)
        for each in EVERY
        if each[0] != "ar" or each[2] == "exact"
    ],
)
def test_every_option_works_or_is_refused(method, verification, mode):
    model, _ = pair()
    speculation = speculation_of(method, verification, mode)
    alone = [((name, value),) for name, value in cases().items()]
    fixed = [(("top_k", 1), *entry) for entry in alone]
    if verification == "greedy":
        with pytest.raises(RequestError, match=r"Greedy verification .* temperature 0\.8"):
            generate(model, [PROMPT], BASE, speculation=speculation)
        fixed = [(*entry, ("temperature", 0.0)) for entry in alone]
    prompts = [PROMPT] * ROWS
    fixed = (*fixed, *fixed[:2])
    completions = generate(model, prompts, list(map(as_params, fixed)), speculation=speculation)
    assert_same_outputs(completions, plain(fixed))
    if verification == "greedy":
        return
    free = (*alone, alone[0], (("max_tokens", 23),))
    completions = generate(model, prompts, list(map(as_params, free)), speculation=speculation)
    if verification == "coupled":
        assert_same_outputs(completions, plain(free))
    for options, completion in zip(free, completions, strict=True):
        ((name, value),) = options
        assert respects(name, value, completion), name
    if verification == "rejection":
        by_option = dict(zip((name for ((name, _),) in free), completions, strict=False))
        assert by_option["seed"].token_ids != by_option["ignore_eos"].token_ids
