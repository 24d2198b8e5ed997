"""The long proof: every drafter says what plain decoding says, over many texts and settings.

All of it is marked slow. Greedy and in float32, as is the demo pair by default on a CPU.
"""

import argparse
import dataclasses
import inspect
import json
import textwrap

import jax
import numpy as np
import pytest
from speculation_cases import (
    OPTIONS,
    PROMPTS,
    SCALES,
    assert_honest_counts,
    assert_same_outputs,
    tokenized,
)
from tiny_models import FAMILY_NAMES, perturbed

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate
from ssd_jax.model import demo_folder, load_model
from ssd_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

NUM_PROMPTS, NUM_TOKENS, ROWS = 200, 128, 25
DEMO_OPTIONS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
KINDS = ("simple", "map", "mod")


@pytest.fixture(scope="module")
def demo():
    return load_model(demo_folder("target"))


@pytest.fixture(scope="module")
def demo_draft():
    return load_model(demo_folder("draft"))


@pytest.fixture(scope="module")
def demo_outputs(demo):
    """Batches of prompts with what plain decoding says to them."""
    prompts = demo_prompts()
    assert len(prompts) == len(set(prompts)) == NUM_PROMPTS
    batches = [prompts[start : start + ROWS] for start in range(0, NUM_PROMPTS, ROWS)]
    return [(some, generate(demo, some, DEMO_OPTIONS)) for some in batches]


def demo_prompts():
    """Texts of several kinds, most of them cut from the standard library's sources."""
    modules = (argparse, dataclasses, inspect, json, textwrap)
    sources = [inspect.getsource(module) for module in modules]
    docstrings = [
        inspect.getdoc(value) or ""
        for module in modules
        for _, value in inspect.getmembers(module, callable)
    ]
    rng = np.random.default_rng(0)
    prompts = []
    for source in sources:
        for _ in range(24):
            start = int(rng.integers(0, len(source) - 600))
            prompts.append(source[start : start + int(rng.integers(40, 600))])
    prompts += [text[:400] for text in dict.fromkeys(docstrings) if len(text) > 40][:50]
    nouns = ("cat", "river", "number", "machine", "garden", "letter", "student", "city")
    for number in range(NUM_PROMPTS - len(prompts)):
        noun, other = nouns[number % 8], nouns[(number * 3 + 1) % 8]
        prompts.append(f"Rewrite: the {noun} saw the {other} {number} times.\nThe {noun} saw" * 3)
    return prompts[:NUM_PROMPTS]


def method_of(name, draft):
    match name.split():
        case ["draft", length]:
            return Speculation(draft=draft, draft_len=int(length))
        case ["combined"]:
            return Speculation(draft=draft, ngram=NgramConfig())
        case [kind]:
            return Speculation(ngram=NgramConfig(kind=kind, max_draft=16))
    raise ValueError(name)


@pytest.mark.parametrize("name", ["draft 2", "draft 4", *KINDS, "combined"])
def test_the_demo_pair_says_the_same(demo, demo_draft, demo_outputs, name):
    jax.clear_caches()
    speculation = method_of(name, demo_draft)
    num_accepted = 0
    for prompts, plain in demo_outputs:
        completions = generate(demo, prompts, DEMO_OPTIONS, speculation=speculation)
        for prompt, one, other in zip(prompts, completions, plain, strict=True):
            assert len(one.token_ids) == NUM_TOKENS
            assert one.token_ids == other.token_ids, prompt
            num_accepted += one.speculation.total.num_accepted_tokens
    assert num_accepted > NUM_PROMPTS * NUM_TOKENS / 10


ALL_LENGTHS = [("coupled", length) for length in (*range(1, 17), 64)]


@pytest.mark.parametrize(
    ("verification", "draft_len"), [*ALL_LENGTHS, *(("rejection", n) for n in (1, 2, 4, 16, 64))]
)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_all_families_and_draft_lengths(family, draft_len, verification):
    jax.clear_caches()  # each case compiles anew, and a process holds only so many programs
    model = tokenized(family)
    options = OPTIONS if verification == "coupled" else OPTIONS[:2] * 2
    options = [dataclasses.replace(params, max_tokens=80) for params in options]
    plain = generate(model, PROMPTS, options)
    other = FAMILY_NAMES[(FAMILY_NAMES.index(family) + draft_len) % len(FAMILY_NAMES)]
    for drafter in {family, other}:
        for scale in SCALES:
            speculation = Speculation(
                draft=perturbed(tokenized(drafter), scale),
                draft_len=draft_len,
                verification=verification,
            )
            completions = generate(model, PROMPTS, options, speculation=speculation)
            assert_same_outputs(completions, plain)
            for completion in completions:
                assert_honest_counts(completion, draft_len)


@pytest.mark.parametrize("max_draft", [4, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_all_families_and_kinds_of_ngrams(family, kind, max_draft):
    jax.clear_caches()
    model = tokenized(family)
    ngram = NgramConfig(kind=kind, n=1, max_draft=max_draft, table_size=1 << 12)
    options = [dataclasses.replace(params, max_tokens=80) for params in OPTIONS]
    plain = generate(model, PROMPTS, options)
    for draft in (None, perturbed(model, SCALES[1])):
        speculation = Speculation(draft=draft, ngram=ngram)
        completions = generate(model, PROMPTS, options, speculation=speculation)
        assert_same_outputs(completions, plain)
        for completion in completions:
            assert_honest_counts(completion, speculation.longest_draft)
