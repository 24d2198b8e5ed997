"""Counts of lookups, hits, branches and accepted tokens, against a replay on the host."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.stats
from speculation_cases import DRAFT_LEN, FALSE_ALARM, GREEDY, PROMPTS
from ssd_cases import BAD, FAIR, FAN_OUT, GOOD, LONG, draft, rounds, ssd, target

from ssd_jax.decoding.finish import Finish
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut
from ssd_jax.generation import generate


def replay(seen):
    """The counts of every row, from the outcomes and what had been prepared for them."""
    num_branches = FAN_OUT.num_branches
    rows = range(4)
    lookups = np.zeros((4, 2), int)
    found_at = np.zeros((4, 2, num_branches), int)
    accepted = np.zeros((4, 2, DRAFT_LEN + 1), int)
    for before, after in itertools.pairwise(seen[1:]):
        prepared, was_hit = before.speculator.prepared, before.speculator.was_hit.astype(int)
        hits = np.zeros(4, bool)
        for row in rows:
            if before.speculator.text.finish[row] != Finish.RUNNING:
                continue
            num_accepted, bonus_token, finish = before.outcome[row].tolist()
            accepted[row, was_hit[row], num_accepted] += 1
            if finish != Finish.RUNNING:
                continue
            lookups[row, was_hit[row]] += 1
            keys = zip(prepared.num_accepted[row], prepared.bonus_token[row], strict=True)
            places = [i for i, key in enumerate(keys) if key == (num_accepted, bonus_token)]
            assert len(places) <= 1
            for place in places:
                hits[row] = True
                found_at[row, was_hit[row], place] += 1
        np.testing.assert_array_equal(after.speculator.was_hit, hits)
    return lookups, found_at, accepted


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
@pytest.mark.parametrize("scale", [GOOD, FAIR, BAD])
def test_counts_are_those_of_a_replay(scale, fallback):
    options = ssd(scale, fallback=fallback)
    seen = rounds(target(), options, PROMPTS, LONG)
    lookups, found_at, accepted = replay(seen)
    by_length = (accepted * np.arange(DRAFT_LEN + 1)).sum(axis=-1)
    completions = generate(target(), PROMPTS, LONG, speculation=options)
    for row, completion in enumerate(completions):
        own = completion.speculation.lookups
        assert completion.speculation.target_steps == accepted[row].sum()
        assert own.lookups == tuple(lookups[row])
        assert own.hits == tuple(found_at[row].sum(axis=-1))
        assert own.found_at == tuple(map(tuple, found_at[row]))
        assert own.accepted == tuple(map(tuple, accepted[row]))
        assert own.hit_rate == found_at[row].sum() / lookups[row].sum()
        drafters = completion.speculation.drafters
        for kind, name in enumerate(("fallback", "prepared")):
            assert drafters[name].num_accepted_tokens == by_length[row, kind]


@pytest.mark.parametrize("scale", [GOOD, BAD])
def test_synthetic_acceptance(scale):
    params = [dataclasses.replace(GREEDY, max_tokens=90, seed=row) for row in range(4)]

    def counts(rate):
        options = ssd(scale, synthetic_acceptance=rate)
        completions = generate(target(), PROMPTS, params, speculation=options)
        assert [len(c.token_ids) for c in completions] == [90] * 4
        return [c.speculation for c in completions]

    for own in counts(1.0):
        assert own.total.num_accepted_tokens == own.total.num_draft_tokens == 72
        assert own.target_steps == 18
        if scale == GOOD:
            assert own.lookups.hit_rate == 1
    for own in counts(0.0):
        assert own.total.num_accepted_tokens == 0
        assert own.target_steps == 90
    some = [own.total for own in counts(0.6)]
    first = sum(own.num_accepted_tokens_per_pos[0] for own in some)
    tries = sum(own.num_drafts for own in some)
    assert scipy.stats.binomtest(first, tries, 0.6).pvalue > FALSE_ALARM


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
def test_synthetic_hits_come_at_their_rate_whatever_the_models_are(fallback):
    params = [dataclasses.replace(GREEDY, max_tokens=90, seed=row) for row in range(4)]

    def lookups(rate, scale):
        options = ssd(
            scale,
            fan_out=2,
            fallback=fallback,
            synthetic_acceptance=0.5,
            synthetic_hit_rate=rate,
        )
        completions = generate(target(), PROMPTS, params, speculation=options)
        assert [len(c.token_ids) for c in completions] == [90] * 4
        counts = [c.speculation.lookups for c in completions]
        return sum(sum(own.hits) for own in counts), sum(sum(own.lookups) for own in counts)

    hits, tries = lookups(1.0, BAD)
    assert hits == tries
    assert lookups(0.0, GOOD)[0] == 0
    hits, tries = lookups(0.7, BAD)
    assert scipy.stats.binomtest(hits, tries, 0.7).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fan_out": (1, 2)}, r"for draft_len 4 has 5 numbers \(for 0 to 4 .*, got 2"),
        ({"fan_out": 0}, "not all 0"),
        ({"fallback": "random"}, "fallback must be one of neural, ngram, got 'random'"),
        (
            {"miss_weight": 1.5, "verification": "rejection"},
            r"miss_weight must .* got 1.5",
        ),
        ({"miss_weight": 0.5}, "only verification rejection knows, got coupled"),
        ({"draft_len": 65}, "draft_len must be a whole number from 1 to 64, got 65"),
        (
            {"synthetic_acceptance": -1},
            r"synthetic_acceptance must be .* got -1",
        ),
        ({"synthetic_hit_rate": 0.5}, "give synthetic_acceptance too"),
        (
            {"synthetic_hit_rate": 2, "synthetic_acceptance": 0.5},
            r"synthetic_hit_rate must be .* from 0 to 1 or None, got 2",
        ),
        ({"verification": "strict"}, "verification must be one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        SSD(draft=draft(GOOD), **options)


def test_more_guesses_than_tokens_are_refused():
    with pytest.raises(RequestError, match=r"at most as many tokens .* \(64\), got 65"):
        generate(target(), PROMPTS, GREEDY, speculation=SSD(draft=draft(GOOD), fan_out=65))


def test_one_list_is_for_both_and_one_number_for_all():
    one = SSD(draft=draft(GOOD), draft_len=2, fan_out=3)
    assert one.fan_out == FanOut(after_hit=(3, 3, 3), after_miss=(3, 3, 3))
    listed = SSD(draft=draft(GOOD), draft_len=2, fan_out=(2, 0, 1))
    assert listed.fan_out == FanOut(after_hit=(2, 0, 1), after_miss=(2, 0, 1))
