"""n-grams first, the draft model where they have nothing: same output, statistics apart."""

import dataclasses

import numpy as np
import pytest
from speculation_cases import (
    DRAFT_LEN,
    HOT,
    OPTIONS,
    SCALES,
    assert_honest_counts,
    assert_same_outputs,
    with_times,
)
from tiny_models import prompt_ids

from ssd_jax.decoding.speculative import verify_widths
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate

MAX_DRAFT = 8
PROMPTS = [prompt_ids(1), prompt_ids(6, seed=3) * 5, prompt_ids(7), prompt_ids(17)]
LONGER = [dataclasses.replace(params, max_tokens=40 + row) for row, params in enumerate(OPTIONS)]


def combined(draft, verification="coupled", kind="simple"):
    ngram = NgramConfig(kind=kind, n=2, max_draft=MAX_DRAFT, table_size=1 << 12)
    return Speculation(draft=draft, ngram=ngram, draft_len=DRAFT_LEN, verification=verification)


def totals(completions):
    """(drafted by n-grams, drafted by the model), all rows together."""
    each = [c.speculation.drafters for c in completions]
    return tuple(sum(d[name].num_draft_tokens for d in each) for name in ("ngram", "draft"))


@pytest.mark.parametrize("options", [LONGER, HOT, OPTIONS[0]], ids=["mixed", "hot", "greedy"])
def test_the_output_is_that_of_plain_decoding(model, drafts, options):
    plain = generate(model, PROMPTS, options)
    for scale in SCALES:
        completions = generate(model, PROMPTS, options, speculation=combined(drafts[scale]))
        assert_same_outputs(completions, plain)
        for completion in completions:
            counts = completion.speculation
            assert set(counts.drafters) == {"ngram", "draft"}
            assert_honest_counts(completion, MAX_DRAFT)
            assert (
                max(np.flatnonzero(counts.drafters["draft"].num_accepted_tokens_per_pos), default=0)
                < DRAFT_LEN
            )
            rounds = [own.num_drafts for own in counts.drafters.values()]
            assert sum(rounds) == counts.total.num_drafts <= counts.target_steps
        assert min(totals(completions)) > 0


def test_one_round_mixes_copied_and_proposed_rows(model, drafts):
    """The prompt that repeats is copied from, the others are the model's, in the same pass."""
    speculation = combined(drafts[0.0])
    completions = generate(
        model,
        PROMPTS,
        [dataclasses.replace(p, max_tokens=2) for p in OPTIONS],
        speculation=speculation,
    )
    drafted = [
        tuple(own.num_draft_tokens for own in c.speculation.drafters.values()) for c in completions
    ]
    assert drafted == [(0, 1), (1, 0), (0, 1), (0, 1)]


def test_greedy_rows_are_the_same_under_rejection(model, drafts):
    plain = generate(model, PROMPTS, LONGER)
    completions = generate(model, PROMPTS, LONGER, speculation=combined(drafts[0.1], "rejection"))
    assert_same_outputs(completions[:2], plain[:2])
    assert [len(c.token_ids) for c in completions] == [len(c.token_ids) for c in plain]
    assert min(totals(completions)) > 0


@pytest.mark.parametrize("with_model", [True, False])
def test_a_row_does_not_depend_on_its_neighbours(model, drafts, with_model):
    """Nor on whether they draft, which decides how wide the pass is."""
    speculation = combined(drafts[0.1] if with_model else None, "rejection")
    together = generate(model, PROMPTS, LONGER, speculation=speculation)
    others = [PROMPTS[0], *[prompt_ids(9, seed=5)] * 3]
    for row in range(4):
        prompts = [*others[1 : row + 1], PROMPTS[row], *others[row + 1 :]]
        options = [dataclasses.replace(LONGER[0], max_tokens=3)] * 4
        options[row] = LONGER[row]
        completions = generate(model, prompts, options, speculation=speculation)
        assert completions[row].token_ids == together[row].token_ids
        assert completions[row].speculation == together[row].speculation


TIMES = {
    "drafting is free": (lambda count: 1.0, lambda count: 1.0),
    "drafting never pays": (lambda count: 1.0 + 9 * count, lambda count: 1.0 + 9 * count),
    "drafting pays at times": (lambda count: 1 + 0.1 * count, lambda count: 1 + 0.3 * count),
}


@pytest.mark.parametrize("kind", ["combined", "draft"])
def test_draft_lengths_from_times_change_no_output(model, drafts, kind):
    plain = generate(model, PROMPTS, LONGER)
    for scale in SCALES:
        speculation = combined(drafts[scale])
        if kind == "draft":
            speculation = dataclasses.replace(speculation, ngram=None)
        for name, seconds in TIMES.items():
            timed = with_times(speculation, *seconds[: len(speculation.drafter.names)])
            completions = generate(model, PROMPTS, LONGER, speculation=timed)
            assert_same_outputs(completions, plain)
            for completion in completions:
                assert_honest_counts(completion, speculation.longest_draft)
                total = completion.speculation.total
                if name == "drafting never pays":  # but is tried again after 32 rounds
                    assert total.num_draft_tokens <= len(speculation.drafter.names)
                    assert completion.speculation.target_steps >= len(completion.token_ids) - 2
                elif name == "drafting is free" and scale == 0 and kind == "draft":
                    assert total.acceptance_rate == 1


WIDTHS = [(9,), (1, 3, 9)]  # the usual ones are 1, 4, 8, 9


@pytest.mark.parametrize("widths", WIDTHS)
def test_any_choice_of_pass_widths_gives_the_same(model, drafts, widths, monkeypatch):
    monkeypatch.setattr(Speculation, "widths", widths)
    speculation = combined(drafts[0.1])
    completions = generate(model, PROMPTS, LONGER, speculation=speculation)
    assert_same_outputs(completions, generate(model, PROMPTS, LONGER))
    monkeypatch.undo()
    usual = generate(model, PROMPTS, LONGER, speculation=speculation)
    assert [c.speculation for c in completions] == [c.speculation for c in usual]


@pytest.mark.parametrize("may_decline", [True, False])
def test_widths_hold_every_draft_and_are_few(may_decline):
    for draft_len in range(1, 65):
        widths = verify_widths(draft_len, may_decline=may_decline)
        assert list(widths) == sorted(set(widths))
        assert widths[-1] == draft_len + 1
        assert len(widths) <= (5 if may_decline else 1)
        assert (widths[0] == 1) == may_decline
