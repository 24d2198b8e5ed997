"""Acceptance by chance: drafts stand at the given rate, whatever was drafted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from speculation_cases import DRAFT_LEN, FALSE_ALARM, GREEDY, PROMPTS

from ssd_jax.engine.speculation import Speculation
from ssd_jax.errors import RequestError
from ssd_jax.generation import generate
from ssd_jax.types import Draft, Sampling
from ssd_jax.verification import verify_synthetic

ROWS, J, V = 20_000, 3, 4


def neutral_sampling(rows):
    zeros, ones = jnp.zeros(rows, jnp.float32), jnp.ones(rows, jnp.float32)
    seeds = jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1)
    return Sampling(
        temperature=zeros,
        top_k=jnp.zeros(rows, jnp.int32),
        top_p=ones,
        min_p=zeros,
        repetition_penalty=ones,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        logit_bias=jnp.zeros((rows, V), jnp.float32),
        prompt_tokens=jnp.zeros((rows, V), bool),
        seed=seeds,
        eos_ids=jnp.full((rows, 4), -1, jnp.int32),
        max_length=jnp.full(rows, 100, jnp.int32),
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 1.0])
def test_the_accepted_prefix_is_geometric(rate):
    """Drafts the target would never accept stand, and those it would choose fall, alike."""
    rows = np.arange(ROWS)
    target_choice = np.full((ROWS, J + 1), 2)
    with np.errstate(divide="ignore"):
        laws = np.log(np.eye(V, dtype=np.float32)[target_choice])
    tokens = np.where(rows[:, None] % 2 == 0, 2, 1) * np.ones((1, J))
    count = (1 + rows % J).astype(np.int32)
    draft = Draft(
        tokens=jnp.asarray(tokens.astype(np.int32)),
        count=jnp.asarray(count),
        law=None,
        drafter=jnp.zeros(ROWS, jnp.int32),
    )
    positions = jnp.full(ROWS, 7, jnp.int32)
    verdict = jax.jit(verify_synthetic)(
        draft, laws, neutral_sampling(ROWS), positions, jnp.float32(rate)
    )
    assert set(np.asarray(verdict.bonus_token).tolist()) == {2}
    num_accepted = np.asarray(verdict.num_accepted)
    for length in range(1, J + 1):
        for parity in (0, 1):
            some = num_accepted[(count == length) & (rows % 2 == parity)]
            law = np.array([rate**n * (1 - rate) for n in range(length)] + [rate**length])
            seen = np.bincount(some, minlength=length + 1)
            assert seen[law == 0].sum() == 0
            possible = law > 0
            if possible.sum() > 1:
                expected = law[possible] * len(some)
                assert scipy.stats.chisquare(seen[possible], expected).pvalue > FALSE_ALARM


def run(model, draft, rate):
    speculation = Speculation(draft=draft, draft_len=DRAFT_LEN, synthetic_acceptance=rate)
    params = dataclasses.replace(GREEDY, max_tokens=90)
    options = [dataclasses.replace(params, seed=row) for row in range(4)]
    return generate(model, PROMPTS, options, speculation=speculation)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_rates_in_the_loop(model, drafts, scale):
    everything = [c.speculation.drafters["draft"] for c in run(model, drafts[scale], 1.0)]
    nothing = [c.speculation.drafters["draft"] for c in run(model, drafts[scale], 0.0)]
    for own in everything:
        assert own.num_accepted_tokens == own.num_draft_tokens == 72  # of 90, the rest is bonus
    for own in nothing:
        assert own.num_accepted_tokens == 0
        assert own.num_drafts == 89  # all but the last round, which has room for one token only
    completions = run(model, drafts[scale], 0.6)
    assert [len(c.token_ids) for c in completions] == [90] * 4
    some = [c.speculation.drafters["draft"] for c in completions]
    first = sum(own.num_accepted_tokens_per_pos[0] for own in some)
    tries = sum(own.num_drafts for own in some)
    assert scipy.stats.binomtest(first, tries, 0.6).pvalue > FALSE_ALARM
    assert 0 < first < tries


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_rate_that_is_no_probability_is_refused(model, rate):
    with pytest.raises(RequestError, match=r"synthetic_acceptance must be .* from 0 to 1"):
        Speculation(draft=model, synthetic_acceptance=rate)
