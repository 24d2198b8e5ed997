"""The distribution of whole outputs of SSD under rejection, against the target's own law."""

import dataclasses

import numpy as np
import pytest
from speculation_cases import FALSE_ALARM
from test_speculative_law import LAWS, NGRAM, PROMPTS, TINY_VOCABULARY, joint_law, p_value
from tiny_models import make_tiny, perturbed

from ssd_jax.engine.ssd_options import SSD
from ssd_jax.generation import generate

NUM_ROWS = 4096
FAN_OUTS = {
    "all hit": 5,  # the whole vocabulary
    "mixed": (2, 1, 1),
    "few hit": (0, 0, 1),  # only after a whole draft, which n-grams do not even propose
}
FAST = {("plain", "mixed", "neural", 0.5)}
EVERY = [
    (law, fan_out, fallback, weight)
    for law in LAWS
    for fan_out in FAN_OUTS
    for fallback in ("neural", "ngram")
    for weight in (1.0, 0.5, 0.0)
]


@pytest.mark.parametrize(
    ("law", "fan_out", "fallback", "weight"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in EVERY],
)
def test_rejection_samples_the_targets_law(law, fan_out, fallback, weight):
    """Of three tokens, over rounds of two drafted ones."""
    target, params = make_tiny(TINY_VOCABULARY), LAWS[law]
    options = SSD(
        draft=perturbed(target.model, 0.7),
        draft_len=2,
        fan_out=FAN_OUTS[fan_out],
        fallback=fallback,
        ngram=NGRAM,
        verification="rejection",
        miss_weight=weight,
    )
    prompts = [PROMPTS[row % 2] for row in range(NUM_ROWS)]
    each = [dataclasses.replace(params, seed=(9 << 40) + row) for row in range(NUM_ROWS)]
    completions = generate(target.model, prompts, each, speculation=options)
    for half, prompt in enumerate(PROMPTS):
        assert p_value(completions[half::2], joint_law(target, params, prompt)) > FALSE_ALARM
    counts = [completion.speculation for completion in completions]
    hits, lookups = (
        np.sum([getattr(own.lookups, name) for own in counts]) for name in ("hits", "lookups")
    )
    if fan_out == "all hit":
        assert hits == lookups
    else:
        least, most = (0.02, 0.98) if fan_out == "mixed" else (0, 0.5)
        assert least <= hits / lookups < most
    for name in ("fallback",) if fan_out == "few hit" else ("prepared", "fallback"):
        assert np.sum([own.drafters[name].num_drafts for own in counts]) > 0
    assert 0.005 < np.mean([own.total.acceptance_rate for own in counts]) < 0.9
