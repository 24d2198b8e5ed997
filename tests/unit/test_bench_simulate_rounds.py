"""The simulator's rounds against closed forms that are written out here once more."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate.costs import MeasuredCosts
from bench.simulate.methods import SimulatedMethod, parse_simulated
from bench.simulate.outcomes import (
    OutcomeLaw,
    OutcomeLaws,
    PowerLaw,
    acceptance_for,
    counted_law,
    geometric_law,
    geometric_tokens,
    power_law_through,
)
from bench.simulate.rounds import Work, expected_rate, simulate
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut
from ssd_jax.tuning.speed import Outcomes, Setting, Times, predict_rate

K = 4
LONG = Work(tokens=4000, runs=24)


def costs(draft_s=0.2, miss_s=0.2, lookup_s=0.0, prepare_s=0.0, hop_s=0.0, overlap=1.0):
    """Times in units of a verification: `draft_s` and `miss_s` of a whole draft."""
    return MeasuredCosts(
        times=Times(
            verify_s=(1.0,) * (K + 1),
            lookup_s=lookup_s,
            neural_s=(miss_s, 0.0),
            ngram_s=0.0,
            prepare_s=(prepare_s, 0.0, 0.0),
        ),
        draft_s=(draft_s, 0.0),
        hop_s=hop_s,
        overlap=overlap,
    )


def flat_law(acceptance, hit_rate):
    """Outcomes found with one guess at a rate that is the same for every accepted length."""
    law = geometric_law(K, acceptance, PowerLaw(first_miss=1.0, decay=1.0))
    return OutcomeLaw(accepted=law.accepted, guessed=np.full((K + 1, 1), hit_rate))


def flat_laws(acceptance, hit_rate):
    law = flat_law(acceptance, hit_rate)
    return OutcomeLaws(after_hit=law, after_miss=law)


SSD = parse_simulated(f"ssd:k={K},f=1")
DRAFT = parse_simulated(f"draft:k={K}")


@pytest.mark.parametrize("hit_rate", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize(("primary_s", "backup_s"), [(0.5, 0.3), (1.4, 0.3), (0.9, 0.0)])
def test_speed_is_that_of_theorem_7_when_nothing_is_lost(hit_rate, primary_s, backup_s):
    tokens = sum(0.7**k for k in range(K + 1))
    speed = tokens / (hit_rate * max(1, primary_s) + (1 - hit_rate) * (1 + backup_s))
    # The theorem charges late preparing to hits alone: a miss finds the draft model free.
    late_s = max(0.0, primary_s - 1) * (1 - hit_rate)
    ours = tokens / (tokens / speed + late_s)
    times = costs(miss_s=backup_s, prepare_s=primary_s)
    assert expected_rate(SSD, times, flat_laws(0.7, hit_rate)) == pytest.approx(ours)
    assert simulate(SSD, times, flat_laws(0.7, hit_rate), LONG).tokens_per_s == pytest.approx(
        ours, rel=0.03
    )


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.0, 1), (1.0, K + 1)])
def test_limits_of_acceptance(acceptance, tokens):
    result = simulate(DRAFT, costs(draft_s=0.25), flat_laws(acceptance, 0), Work(tokens=500))
    assert result.tokens_per_round == tokens
    assert result.tokens_per_s == pytest.approx(tokens / 1.25)


def test_ssd_that_always_hits_waits_for_its_first_draft_only():
    work = Work(tokens=50 * (K + 1), answers=3)
    result = simulate(SSD, costs(miss_s=0.5), flat_laws(1.0, 1.0), work)
    assert result.hit_rate == 1
    assert result.tokens_per_s == pytest.approx(work.tokens / (50 + 0.5))


def test_ssd_that_never_hits_is_synchronous_speculation_with_lookups():
    laws = flat_laws(0.6, 0.0)
    ssd = simulate(SSD, costs(miss_s=0.4, lookup_s=0.1), laws, LONG)
    draft = simulate(DRAFT, costs(draft_s=0.5), laws, LONG)
    assert ssd.hit_rate == 0
    assert ssd.waits == 1
    assert ssd.round_s == pytest.approx(draft.round_s)
    assert ssd.tokens_per_s == pytest.approx(draft.tokens_per_s, rel=0.03)


def test_plain_decoding_emits_one_token_a_pass():
    result = simulate(SimulatedMethod(), costs(), None, Work(rows=3, tokens=7))
    assert result.tokens_per_s == pytest.approx(3)
    assert (result.hit_rate, result.tokens_per_round) == (None, 1)


@given(
    acceptance=st.floats(0.05, 0.95),
    after_hit=st.floats(0.05, 0.98),
    after_miss=st.floats(0.05, 0.98),
    rows=st.integers(1, 6),
    prepare_s=st.floats(0, 2),
    overlap=st.floats(1, 1.5),
    ngram_acceptance=st.floats(0, 0.9),
)
@settings(max_examples=25)
def test_events_agree_with_the_closed_form(
    acceptance, after_hit, after_miss, rows, prepare_s, overlap, ngram_acceptance
):
    times = costs(miss_s=0.7, lookup_s=0.1, prepare_s=prepare_s, hop_s=0.05, overlap=overlap)
    laws = OutcomeLaws(
        after_hit=flat_law(acceptance, after_hit),
        after_miss=flat_law(ngram_acceptance, after_miss),
    )
    result = simulate(SSD, times, laws, Work(rows=rows, tokens=3000, runs=24))
    wanted = expected_rate(SSD, times, laws, rows)
    # Rows of an answer end at different rounds, so a batch does not stay full to its end.
    assert result.tokens_per_s == pytest.approx(wanted, rel=0.06)
    hit_rate = laws.stationary_hit_rate((1,) * (K + 1), (1,) * (K + 1))
    assert result.hit_rate == pytest.approx(hit_rate, abs=0.03)


@given(
    hit_rate=st.floats(0, 1),
    acceptance=st.floats(0, 1),
    rows=st.integers(1, 16),
    prepare_s=st.floats(0, 3),
    miss_s=st.floats(0, 3),
)
def test_closed_form_is_that_of_tune_where_both_have_one(
    hit_rate, acceptance, rows, prepare_s, miss_s
):
    times = costs(miss_s=miss_s, lookup_s=0.1, prepare_s=prepare_s)
    counts = (1,) * (K + 1)
    setting = Setting(
        draft_len=K, fan_out=FanOut(after_hit=counts, after_miss=counts), fallback="neural"
    )
    tokens = geometric_tokens(K, acceptance)
    tuned = predict_rate(times.times, setting, hit_rate, tokens, rows)
    ours = expected_rate(SSD, times, flat_laws(acceptance, hit_rate), rows)
    assert ours == pytest.approx(rows * tuned.tokens_per_s)


@given(hit_rate=st.floats(0.01, 0.99), first=st.integers(1, 12), more=st.integers(1, 12))
def test_more_rows_wait_more(hit_rate, first, more):
    laws, times = flat_laws(0.7, hit_rate), costs(miss_s=0.5)
    fewer = expected_rate(SSD, times, laws, first) / first
    many = expected_rate(SSD, times, laws, first + more) / (first + more)
    never = 1.0 / (1 + 0.5) * laws.after_hit.tokens_per_round
    assert never <= many * (1 + 1e-9)
    assert many <= fewer


def test_more_rows_wait_more_in_events_too():
    laws, times = flat_laws(0.7, 0.8), costs(miss_s=0.5)
    results = [
        simulate(SSD, times, laws, Work(rows=rows, answers=4, tokens=400)) for rows in (1, 4, 16)
    ]
    waits = [result.waits for result in results]
    assert waits == sorted(waits)
    assert waits[2] > 0.95
    speeds = [result.tokens_per_s / rows for rows, result in zip((1, 4, 16), results, strict=True)]
    assert speeds == sorted(speeds, reverse=True)


@given(acceptance=st.floats(0, 1), hits=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_backup_as_good_as_the_primary_is_never_slower_than_synchronous(acceptance, hits):
    low, high = sorted(hits)
    times = costs(draft_s=0.4, miss_s=0.4, prepare_s=1.0)
    synchronous = expected_rate(DRAFT, times, flat_laws(acceptance, 0))
    slow = expected_rate(SSD, times, flat_laws(acceptance, low))
    fast = expected_rate(SSD, times, flat_laws(acceptance, high))
    assert synchronous * (1 - 1e-9) <= slow <= fast * (1 + 1e-9)


def test_same_seed_same_figures_other_seed_others():
    laws = flat_laws(0.7, 0.8)
    first, again, other = (
        simulate(SSD, costs(), laws, Work(runs=4), seed=seed) for seed in (5, 5, 6)
    )
    assert dataclasses.asdict(first) == dataclasses.asdict(again)
    assert first.tokens_per_s != other.tokens_per_s


def test_overlap_slows_what_runs_at_the_same_time_only():
    laws = flat_laws(1.0, 1.0)
    alone = 1 / expected_rate(SSD, costs(prepare_s=0.5), laws)
    together = 1 / expected_rate(SSD, costs(prepare_s=0.5, overlap=1.2), laws)
    assert (together - alone) * (K + 1) == pytest.approx(0.2 * 0.5)


def test_fan_out_after_a_miss_has_its_own_list():
    """Only outcomes with nothing accepted are foretold after a miss, and nothing is accepted."""
    nothing = flat_law(0.0, 1.0)
    fan_out = FanOut(after_hit=(0, 1, 1, 1, 1), after_miss=(1, 0, 0, 0, 0))
    method = SimulatedMethod(draft_len=K, fan_out=fan_out)
    laws = OutcomeLaws(after_hit=nothing, after_miss=nothing)
    result = simulate(method, costs(), laws, Work(tokens=1001, runs=2))
    assert result.hit_rate == pytest.approx(0.5)  # a hit, a miss, a hit ...
    assert laws.stationary_hit_rate(fan_out.after_hit, fan_out.after_miss) == 0.5


@given(draft_len=st.integers(1, 12), acceptance=st.floats(0.01, 0.99))
def test_acceptance_is_found_again_from_tokens_a_round(draft_len, acceptance):
    tokens = geometric_tokens(draft_len, acceptance)
    assert tokens == pytest.approx((1 - acceptance ** (draft_len + 1)) / (1 - acceptance))
    assert acceptance_for(draft_len, tokens) == pytest.approx(acceptance, abs=1e-6)


@given(share=st.floats(0, 1), decay=st.floats(0.2, 2), guesses=st.integers(1, 6))
def test_power_law_goes_through_its_point_and_grows(share, decay, guesses):
    least = 1 - guesses**-decay
    hit_rate = least + share * (1 - least)
    held = np.cumsum(power_law_through(guesses, hit_rate, decay).guesses())
    assert held[guesses - 1] == pytest.approx(hit_rate)
    assert np.all(np.diff(held) >= -1e-12)
    if least > 0.01:
        with pytest.raises(RequestError, match="lower the decay"):
            power_law_through(guesses, least - 0.01, decay)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ngram", "must be ar, draft or ssd"),
        ("ar:k=2", "Options of ar are none"),
        ("draft:k=x", "whole numbers"),
        ("draft:k=0", "k must be 1 or more"),
        ("draft:k=100", "k must be from 0 to 64"),
        ("ssd:k=3,f=1-2", "4 numbers"),
        ("ssd:k=0", "draft a token at least"),
        ("ssd:k=2,fallback=none", "neural or ngram"),
        ("ssd:k=2,f=0", "not all 0"),
    ],
)
def test_unknown_methods_are_refused_in_words(name, words):
    with pytest.raises(RequestError, match=words):
        parse_simulated(name)


def test_impossible_laws_and_works_are_refused():
    law = flat_law(0.5, 0.5)
    with pytest.raises(RequestError, match="sum to 1"):
        dataclasses.replace(law, accepted=law.accepted / 2)
    with pytest.raises(RequestError, match="from 0 to 1"):
        dataclasses.replace(law, guessed=np.full((K + 1, 2), 0.6))
    with pytest.raises(RequestError, match="guesses how often"):
        law.hit_chances((2,) * (K + 1))
    with pytest.raises(RequestError, match="got a method with 5"):
        simulate(parse_simulated("draft:k=5"), costs(), flat_laws(0.5, 0.5), LONG)
    with pytest.raises(RequestError, match="how drafts come out"):
        simulate(DRAFT, costs(), None, LONG)
    with pytest.raises(RequestError, match="at least 1"):
        Work(rows=0)
    with pytest.raises(RequestError, match="from 1 to 5"):
        acceptance_for(K, 5.5)


def test_trace_law_keeps_hits_of_each_length():
    outcomes = Outcomes(
        accepted=np.array([30, 10]), hits_by_rank=np.array([[15, 6], [10, 0]]), lookups=40
    )
    law = counted_law(outcomes)
    assert law.hit_chances((2, 1)) == pytest.approx([0.7, 1.0])
    assert law.hit_rate((1, 0)) == pytest.approx(15 / 40)
    assert math.isclose(law.tokens_per_round, 1.25)
