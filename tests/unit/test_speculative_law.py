"""The distribution of whole outputs under rejection, against the target's law from its logits."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.stats
from speculation_cases import FALSE_ALARM, with_times
from tiny_models import make_tiny, perturbed, reference_law

from ssd_jax.config import ModelConfig
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate
from ssd_jax.sampling_params import SamplingParams

TINY_VOCABULARY = ModelConfig(
    family="llama",
    vocab_size=5,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_context=64,
)
NUM_ROWS = 4096
LAWS = {
    "plain": SamplingParams(max_tokens=5, temperature=1.0),
    "warped": SamplingParams(
        max_tokens=4, temperature=1.4, top_k=4, frequency_penalty=0.5, logit_bias={2: 0.7}
    ),
}


PROMPTS = ([1, 3], [3, 2, 4, 3])  # the second one's last token was there before: an n-gram
NGRAM = NgramConfig(n=1, max_draft=2)


def joint_law(target, params, prompt):
    """The law [5 5 5] of the next three tokens, from the target alone."""
    joint = np.ones((5, 5, 5))
    for text in itertools.chain.from_iterable(
        itertools.product(range(5), repeat=count) for count in range(3)
    ):
        logits = target.logits([*prompt, *text])[-1]
        law = np.exp(reference_law(logits, params, prompt, text))
        joint[text] *= law.reshape(-1, *[1] * (2 - len(text)))
    assert joint.sum() == pytest.approx(1)
    return joint.ravel()


def p_value(completions, law):
    """Chi-square p-value of the first three tokens; cells expecting less than 5 go together."""
    observed = np.zeros((5, 5, 5))
    for completion in completions:
        observed[completion.token_ids[:3]] += 1
    expected, observed = law * len(completions), observed.ravel()
    assert not observed[expected == 0].any()
    rare = expected < 5
    observed = np.array([*observed[~rare], observed[rare].sum()])
    expected = np.array([*expected[~rare], expected[rare].sum()])
    return scipy.stats.chisquare(observed, expected).pvalue


def costly(count):
    """Seconds of a round: each row now drafts, now does not."""
    return 1 + 0.6 * count


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("plain", "draft"),
        ("warped", "draft"),
        ("plain", "ngram"),
        ("warped", "combined"),
        ("plain", "paced"),
    ],
)
def test_rejection_samples_the_targets_law(name, method):
    """Of three tokens, over rounds of two drafted ones; rows with n-grams beside rows without."""
    target, params = make_tiny(TINY_VOCABULARY), LAWS[name]
    speculation = Speculation(
        draft=None if method == "ngram" else perturbed(target.model, 0.7),
        ngram=None if method in ("draft", "paced") else NGRAM,
        draft_len=2,
        verification="rejection",
    )
    if method == "paced":
        speculation = with_times(speculation, costly)
    prompts = [PROMPTS[row % 2] for row in range(NUM_ROWS)]
    options = [dataclasses.replace(params, seed=(9 << 40) + row) for row in range(NUM_ROWS)]
    completions = generate(target.model, prompts, options, speculation=speculation)
    for half, prompt in enumerate(PROMPTS):
        assert p_value(completions[half::2], joint_law(target, params, prompt)) > FALSE_ALARM
    each = [c.speculation for c in completions]
    assert 0.1 < np.mean([counts.total.acceptance_rate for counts in each]) < 0.8
    for drafter in speculation.drafter.names:
        assert sum(counts.drafters[drafter].num_drafts for counts in each) > NUM_ROWS / 10
    if method == "combined":
        assert all(counts.drafters["ngram"].num_drafts > 0 for counts in each[1::2])
