"""n-gram drafts inside the decoding loop: the output stays that of plain decoding."""

import dataclasses

import numpy as np
import pytest
from speculation_cases import assert_honest_counts
from tiny_models import prompt_ids, tiny, tiny_tokenizer

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate, stream
from ssd_jax.sampling_params import SamplingParams

REPEATING = prompt_ids(6, seed=3) * 5
PROMPTS = [prompt_ids(1), REPEATING, prompt_ids(7), prompt_ids(17)]
OPTIONS = [
    SamplingParams(max_tokens=40, seed=0),
    SamplingParams(max_tokens=40, seed=1),
    SamplingParams(max_tokens=37, temperature=0.8, seed=2, top_p=0.9, frequency_penalty=0.3),
    SamplingParams(max_tokens=40, temperature=0.3, seed=3, logit_bias={5: -np.inf}),
]


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(tiny("qwen3").model, tokenizer=tiny_tokenizer())


def ngram(kind, n=1, max_draft=8):
    options = NgramConfig(kind=kind, n=n, max_draft=max_draft, table_size=1 << 12)
    return Speculation(ngram=options)


@pytest.mark.parametrize("kind", ["simple", "map", "mod"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_output_is_that_of_plain_decoding(model, kind, n):
    plain = generate(model, PROMPTS, OPTIONS)
    drafted = generate(model, PROMPTS, OPTIONS, speculation=ngram(kind, n))
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert sum(c.speculation.total.num_accepted_tokens for c in drafted) > 0
    for completion in drafted:
        assert_honest_counts(completion, 8)


def test_where_nothing_repeats_nothing_is_drafted(model):
    options = SamplingParams(max_tokens=12)
    plain = generate(model, [prompt_ids(17)], options)
    (drafted,) = generate(model, [prompt_ids(17)], options, speculation=ngram("simple", n=16))
    assert drafted.token_ids == plain[0].token_ids
    counts = drafted.speculation
    assert (counts.total.num_draft_tokens, counts.target_steps) == (0, 12)
    assert (counts.total.num_drafts, counts.total.acceptance_rate) == (0, 0.0)


def test_the_longest_draft_ends_exactly_at_the_limit(model):
    for max_tokens in (1, 2, 5):
        options = SamplingParams(max_tokens=max_tokens)
        plain = generate(model, [REPEATING], options)
        drafted = generate(model, [REPEATING], options, speculation=ngram("simple", 1, 64))
        assert drafted[0].token_ids == plain[0].token_ids
        assert drafted[0].speculation.total.num_draft_tokens <= max_tokens


def test_streaming_gives_the_same_text(model):
    plain = generate(model, PROMPTS, OPTIONS)
    texts = [""] * len(PROMPTS)
    for delta in stream(model, PROMPTS, OPTIONS, speculation=ngram("mod")):
        texts[delta.row] += delta.text
    assert texts == [completion.text for completion in plain]
