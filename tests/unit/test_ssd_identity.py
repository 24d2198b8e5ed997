"""SSD says what plain decoding says: found drafts, fallback drafts, and rows of both kinds."""

import dataclasses

import jax
import numpy as np
import pytest
from speculation_cases import (
    DRAFT_LEN,
    GREEDY,
    HOT,
    PROMPTS,
    assert_honest_counts,
    assert_same_outputs,
    tokenized,
)
from ssd_cases import BAD, FAIR, FAN_OUT, GOOD, LONG, draft, hit_rate, ssd, target
from tiny_models import FAMILY_NAMES, perturbed, prompt_ids

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.fan_out import FanOut, geometric_fan_out
from ssd_jax.generation import generate

QUALITIES = (GOOD, FAIR, BAD)
BATCHES = {"mixed": LONG, "hot": HOT, "greedy": GREEDY}
REPEATING = [prompt_ids(1), prompt_ids(6, seed=3) * 5, prompt_ids(7), prompt_ids(17)]


def check(options, params, prompts=PROMPTS):
    """The completions, which are those of plain decoding."""
    completions = generate(target(), prompts, params, speculation=options)
    assert_same_outputs(completions, generate(target(), prompts, params))
    for completion in completions:
        assert set(completion.speculation.drafters) == {"prepared", "fallback"}
        assert_honest_counts(completion, options.draft_len)
    return completions


@pytest.mark.parametrize("params", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("fallback", ["neural", "ngram"])
def test_the_output_is_that_of_plain_decoding(fallback, params):
    rates = [
        hit_rate(check(ssd(scale, fallback=fallback), params, REPEATING)) for scale in QUALITIES
    ]
    assert rates[0] > rates[2]
    assert 0 < rates[1] < 1  # both paths ran, in one batch


@pytest.mark.parametrize("params", BATCHES.values(), ids=BATCHES)
def test_a_guess_of_every_outcome_always_hits(params):
    """Whatever the draft is worth; there are more branches than tokens in the vocabulary."""
    options = ssd(BAD, draft_len=1, fan_out=target().config.vocab_size)
    completions = check(options, params)
    assert hit_rate(completions) == 1
    counts = [completion.speculation for completion in completions]
    assert all(c.drafters["fallback"].num_drafts <= 1 for c in counts)  # the first has none before
    assert any(c.total.acceptance_rate < 1 for c in counts)


@pytest.mark.parametrize("params", BATCHES.values(), ids=BATCHES)
def test_guesses_that_cannot_be_right_never_hit(params):
    """The target drafts for itself, so all is accepted, and only other outcomes are guessed."""
    completions = check(ssd(GOOD, fan_out=(5, 0, 2, 0, 0)), params)
    assert hit_rate(completions) == 0
    for completion in completions:
        assert completion.speculation.lookups.lookups[0] > 0
        assert completion.speculation.drafters["prepared"].num_drafts == 0
        assert completion.speculation.total.acceptance_rate == 1


def test_a_perfect_draft_is_found_after_the_whole_draft():
    """Under coupling one guess is enough: the draft knows the noise that the target draws with."""
    for params in BATCHES.values():
        completions = check(ssd(GOOD), params)
        assert hit_rate(completions) == 1
        for completion in completions:
            own = completion.speculation.lookups
            where = [sum(pair) for pair in zip(*own.found_at, strict=True)]
            # The first branch of the last depth: 8 branches are before it after a hit, 7 else.
            assert own.found_at[1][8] + own.found_at[0][7] == sum(where) > 0


@pytest.mark.parametrize("fallback", ["neural", pytest.param("ngram", marks=pytest.mark.slow)])
def test_rejection_with_greedy_rows(fallback):
    plain = generate(target(), REPEATING, LONG)
    for scale in QUALITIES:
        options = ssd(scale, fallback=fallback, verification="rejection", miss_weight=0.5)
        completions = generate(target(), REPEATING, LONG, speculation=options)
        assert_same_outputs(completions[:2], plain[:2])
        assert [len(c.token_ids) for c in completions] == [len(c.token_ids) for c in plain]
        for completion in completions:
            assert_honest_counts(completion, DRAFT_LEN)
        assert generate(target(), REPEATING, LONG, speculation=options) == completions


@pytest.mark.slow
def test_rejection_guesses_the_bonus_token_by_the_targets_own_noise():
    """Draft and target agree, so all is accepted and the first guess after it is right."""
    options = ssd(GOOD, verification="rejection", miss_weight=1)
    completions = generate(target(), PROMPTS, HOT, speculation=options)
    assert hit_rate(completions) == 1
    assert all(c.speculation.total.acceptance_rate == 1 for c in completions)


def test_a_permutation_of_rows_permutes_the_outputs():
    """Statistics too, with random draws, and though other rows decide when a fallback runs."""
    options = ssd(FAIR, verification="rejection", miss_weight=0.5)
    together = generate(target(), PROMPTS, LONG, speculation=options)
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        turned = generate(
            target(),
            [PROMPTS[row] for row in order],
            [LONG[row] for row in order],
            speculation=options,
        )
        for place, row in enumerate(order):
            bare = dataclasses.replace(turned[place], logprobs=None)
            assert bare == dataclasses.replace(together[row], logprobs=None)


def test_a_row_does_not_depend_on_its_neighbours():
    options = ssd(FAIR, verification="rejection", miss_weight=0.5)
    together = generate(target(), PROMPTS, LONG, speculation=options)
    for row in range(4):
        prompts = [prompt_ids(9, seed=5)] * 4
        params = [dataclasses.replace(GREEDY, max_tokens=3)] * 4
        prompts[row], params[row] = PROMPTS[row], LONG[row]
        own = generate(target(), prompts, params, speculation=options)[row]
        assert own.token_ids == together[row].token_ids
        assert own.speculation == together[row].speculation


@pytest.mark.slow
def test_a_row_alone_says_what_it_says_in_a_batch():
    together = generate(target(), PROMPTS, LONG, speculation=ssd())
    for row in range(4):
        own = generate(target(), [PROMPTS[row]], [LONG[row]], speculation=ssd())[0]
        assert own.token_ids == together[row].token_ids
        assert own.speculation == together[row].speculation


def fan_outs(draft_len):
    """Fan-outs of all kinds for drafts of that length."""
    last = (0,) * draft_len
    return {
        "one": 1,
        "wide": 6,
        "first only": (4, *last),
        "last only": (*last, 2),
        "holes": FanOut(
            after_hit=tuple(3 * (j % 2) for j in range(draft_len + 1)),
            after_miss=tuple(2 * (1 - j % 2) for j in range(draft_len + 1)),
        ),
        "geometric": geometric_fan_out(draft_len, 3 * draft_len + 3, 0.7, 1.0),
        "miss wider": FanOut(after_hit=(*last, 1), after_miss=(5,) * (draft_len + 1)),
    }


EVERY = [
    (draft_len, kind, fallback)
    for draft_len in range(1, 9)
    for kind in fan_outs(1)
    for fallback in ("neural", "ngram")
]


@pytest.mark.slow
@pytest.mark.parametrize(("draft_len", "kind", "fallback"), EVERY)
def test_all_fan_outs_and_draft_lengths(draft_len, kind, fallback):
    jax.clear_caches()
    params = [dataclasses.replace(one, max_tokens=36) for one in LONG]
    for scale in QUALITIES:
        options = ssd(
            scale,
            draft_len=draft_len,
            fan_out=fan_outs(draft_len)[kind],
            fallback=fallback,
            ngram=NgramConfig(kind=("simple", "map", "mod")[draft_len % 3], n=1),
        )
        for batch in (params, HOT, GREEDY):
            check(options, batch, REPEATING)
        rejecting = dataclasses.replace(options, verification="rejection", miss_weight=0.3)
        completions = generate(target(), REPEATING, params, speculation=rejecting)
        assert_same_outputs(completions[:2], generate(target(), REPEATING, params)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_all_families_draft_for_each_other(family):
    jax.clear_caches()
    model = tokenized(family)
    plain = generate(model, PROMPTS, LONG)
    other = FAMILY_NAMES[(FAMILY_NAMES.index(family) + 2) % len(FAMILY_NAMES)]
    for drafter in {family, other}:
        for scale in QUALITIES:
            options = SSD(draft=perturbed(tokenized(drafter), scale), fan_out=FAN_OUT)
            completions = generate(model, PROMPTS, LONG, speculation=options)
            assert_same_outputs(completions, plain)


@pytest.mark.slow
@pytest.mark.parametrize("size", [80, 60])
def test_a_padded_vocabulary_of_the_draft_changes_nothing(size):
    """Embeddings of two models are often padded to different sizes."""
    own = draft(GOOD)
    rows = np.arange(size) % own.config.vocab_size
    params = dataclasses.replace(
        own.params, embedding=own.params.embedding[rows], lm_head=own.params.lm_head[:, rows]
    )
    config = dataclasses.replace(own.config, vocab_size=size)
    padded = dataclasses.replace(own, config=config, params=params)
    options = SSD(draft=padded, draft_len=1, fan_out=(1, 2))
    completions = generate(target(), PROMPTS, LONG, speculation=options)
    assert_same_outputs(completions, generate(target(), PROMPTS, LONG))
    assert hit_rate(completions) == 1
