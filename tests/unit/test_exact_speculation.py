"""Exact mode: in bfloat16, speculation and plain decoding of one width agree bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation_cases import (
    DRAFT_LEN,
    PROMPTS,
    SCALES,
    assert_honest_counts,
    assert_same_outputs,
    with_times,
)
from tiny_models import perturbed

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.errors import RequestError
from ssd_jax.generation import generate
from ssd_jax.sampling_params import SamplingParams

LONG = [
    SamplingParams(max_tokens=150, seed=0, logprobs=4),
    SamplingParams(max_tokens=150, seed=1, logprobs=2, temperature=1.0),
    SamplingParams(max_tokens=140, seed=2, frequency_penalty=0.3, logprobs=1),
    SamplingParams(max_tokens=150, seed=3, logprobs=0, temperature=0.6, top_p=0.9),
]


def in_bfloat16(model):
    return dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    )


@pytest.fixture(scope="module")
def coarse(model):
    return in_bfloat16(model)


def test_a_draft_model_changes_no_bit(model, coarse):
    plain = generate(coarse, PROMPTS, LONG, speculation=Speculation(exact=True))
    for scale in SCALES:
        draft = in_bfloat16(perturbed(model, scale))
        speculation = Speculation(draft=draft, exact=True)
        completions = generate(coarse, PROMPTS, LONG, speculation=speculation)
        assert_same_outputs(completions, plain, exactly=True)
        for completion in completions:
            assert_honest_counts(completion, DRAFT_LEN)
    for completion in plain:
        counts = completion.speculation
        assert counts.target_steps == len(completion.token_ids)
        assert counts.drafters == {}
        assert counts.total.num_draft_tokens == 0


@pytest.mark.parametrize("with_draft", [False, True])
def test_ngrams_change_no_bit(model, coarse, with_draft):
    draft = in_bfloat16(perturbed(model, 0.1)) if with_draft else None
    ngram = NgramConfig(n=1, max_draft=DRAFT_LEN)
    plain = generate(coarse, PROMPTS, LONG, speculation=Speculation(exact=True))
    speculation = Speculation(draft=draft, ngram=ngram, exact=True)
    completions = generate(coarse, PROMPTS, LONG, speculation=speculation)
    assert_same_outputs(completions, plain, exactly=True)
    assert sum(c.speculation.drafters["ngram"].num_accepted_tokens for c in completions) > 0


def test_without_it_bits_differ(coarse):
    """So the tests above could fail: a pass of one token computes other roundings than one of 5."""
    wide = generate(coarse, PROMPTS, LONG, speculation=Speculation(exact=True))
    narrow = generate(coarse, PROMPTS, LONG)
    values = [[entry.logprob for c in run for entry in c.logprobs[:20]] for run in (wide, narrow)]
    assert values[0] != values[1]
    np.testing.assert_allclose(*[[run[0].logprobs[0].logprob] for run in (wide, narrow)], atol=0.1)


def test_every_pass_is_equally_wide(model):
    ngram = NgramConfig(max_draft=16)
    assert Speculation(exact=True).widths == (5,)
    assert Speculation(draft=model, exact=True).widths == (5,)
    assert Speculation(ngram=ngram, exact=True).widths == (17,)
    assert Speculation(draft=model, ngram=ngram, exact=True).widths == (17,)
    assert len(Speculation(ngram=ngram).widths) > 1


def test_measured_times_do_not_go_with_it(model):
    speculation = Speculation(draft=model)
    timed = with_times(speculation, lambda count: 1.0 + count)
    with pytest.raises(RequestError, match="round_times or exact"):
        dataclasses.replace(timed, exact=True)
