import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning_cases import times, tuned

from ssd_jax.engine.counts import LookupCounts
from ssd_jax.errors import ConfigError
from ssd_jax.fan_out import FanOut, branch_layout, uniform_fan_out
from ssd_jax.tuning.measuring import fit_prepare, read_outcomes, without_delays
from ssd_jax.tuning.speed import (
    WAIT_MUST_GAIN,
    Behaviour,
    Outcomes,
    Prediction,
    Setting,
    choose,
    crossover_batch,
    predict,
    predict_all,
    predict_rate,
    shorten,
    stationary_hit_rate,
)
from ssd_jax.tuning.tuned_file import read_tuned, write_tuned

SHARE = st.floats(0.01, 0.99)
SMALL_S = st.floats(0, 0.02)


def setting(draft_len=3, guesses=2, fallback="neural"):
    counts = uniform_fan_out(draft_len, guesses)
    return Setting(
        draft_len=draft_len,
        fan_out=FanOut(after_hit=counts, after_miss=counts),
        fallback=fallback,
    )


def geometric(draft_len, acceptance, size=10**6):
    """Outcomes of which each token is accepted with the same probability, all found at rank 0."""
    shares = [acceptance**j * (1 - acceptance) for j in range(draft_len)] + [acceptance**draft_len]
    accepted = np.round(np.array(shares) * size).astype(int)
    return Outcomes(accepted=accepted, hits_by_rank=accepted[:, None], lookups=int(accepted.sum()))


@given(hit=SHARE, prepared=SHARE, afresh=SHARE, draft_len=st.integers(1, 8), fallback_s=SMALL_S)
def test_predict_is_theorem_7_where_preparing_is_hidden(
    hit, prepared, afresh, draft_len, fallback_s
):
    def expected_tokens(acceptance):
        return (1 - acceptance ** (draft_len + 1)) / (1 - acceptance)

    size = 10**6
    after_hit, after_miss = (
        dataclasses.replace(
            outcomes, hits_by_rank=np.array([[round(hit * size)]] + [[0]] * draft_len), lookups=size
        )
        for outcomes in (geometric(draft_len, prepared), geometric(draft_len, afresh))
    )
    behaviour = Behaviour(after_hit=after_hit, after_miss=after_miss, foretold=(True, True))
    chosen = setting(draft_len, 1, "ngram")
    got = predict(times(ngram_s=fallback_s, prepare_s=(0.009, 0, 0)), behaviour, chosen)
    backup = fallback_s / 0.01  # in verifications
    speedup = (hit * expected_tokens(prepared) + (1 - hit) * expected_tokens(afresh)) / (
        hit + (1 - hit) * (1 + backup)
    )
    assert got.tokens_per_s * 0.01 == pytest.approx(speedup, rel=1e-3)
    assert not got.target_waits


@given(hit=SHARE, batch_size=st.integers(1, 64), start=SMALL_S, token=SMALL_S)
def test_a_batch_waits_for_its_slowest_row(hit, batch_size, start, token):
    chosen = setting(draft_len=4)
    measured = times(neural_s=(start, token))
    got = predict_rate(measured, chosen, hit, 3.0, batch_size)
    backup = (start + 4 * token) / 0.01
    denominator = hit**batch_size + (1 - hit**batch_size) * (1 + backup)  # Corollary 16
    assert got.tokens_per_s * 0.01 == pytest.approx(3.0 / denominator)


def test_preparing_longer_than_verifying_sets_the_pace():
    measured = times(lookup_s=0.001, prepare_s=(0.002, 0.001, 0.0005))
    got = predict_rate(measured, setting(draft_len=3, guesses=2), 1.0, 2.0)
    assert got.prepare_s == pytest.approx(0.002 + 3 * (0.001 + 8 * 0.0005))
    assert got.target_waits
    assert got.round_s == pytest.approx(0.001 + got.prepare_s)


@pytest.mark.parametrize(
    ("hit_rate", "row"),
    [
        (0.75, [math.inf, 4.4, 2.7, 2.0, 1.2, 0.8]),
        (0.85, [5.5, 3.1, 2.2, 1.7, 1.1, 0.8]),
        (0.90, [4.5, 2.8, 2.0, 1.6, 1.0, 0.7]),
    ],
)
def test_crossover_batch_of_worked_examples(hit_rate, row):
    # Four tokens after a hit, 3.8 after a neural fallback, 1 after one that costs nothing.
    neural, fast = (4 * hit_rate + missed * (1 - hit_rate) for missed in (3.8, 1.0))
    for fallback_s, expected in zip((0.2, 0.3, 0.4, 0.5, 0.75, 1.0), row, strict=True):
        got = crossover_batch(hit_rate, 1.0, (neural, fast), (fallback_s, 0.0))
        assert got == pytest.approx(expected, abs=0.05)


@given(
    hit=SHARE,
    tokens=st.tuples(st.floats(1, 9), st.floats(1, 9)),
    fallback_s=st.tuples(SMALL_S, SMALL_S),
    batch_size=st.integers(1, 100),
)
def test_crossover_batch_is_where_the_faster_fallback_changes(hit, tokens, fallback_s, batch_size):
    measured = times(neural_s=(fallback_s[0], 0.0), ngram_s=fallback_s[1])
    neural, fast = (
        predict_rate(measured, setting(fallback=name), hit, per_round, batch_size).tokens_per_s
        for name, per_round in zip(("neural", "ngram"), tokens, strict=True)
    )
    crossover = crossover_batch(hit, 0.01, tokens, fallback_s)
    # Where both speeds are equal up to rounding, either answer is right.
    if tokens[0] >= tokens[1] and neural != pytest.approx(fast, rel=1e-9):
        assert (batch_size > crossover) == (fast > neural)


@given(after_hit=SHARE, after_miss=SHARE)
def test_stationary_hit_rate_is_where_rounds_settle(after_hit, after_miss):
    rate = 0.0
    for _ in range(3000):
        rate = rate * after_hit + (1 - rate) * after_miss
    assert stationary_hit_rate(after_hit, after_miss) == pytest.approx(rate, abs=1e-6)
    assert stationary_hit_rate(1.0, 0.0) == 0.0


@given(
    start=st.floats(0, 0.02),
    step=st.floats(0, 0.002),
    branch=st.floats(1e-6, 1e-3),
    draft_len=st.integers(1, 8),
)
def test_budget_is_the_most_that_fits(start, step, branch, draft_len):
    measured = times(prepare_s=(start, step, branch))
    budget = measured.budget(draft_len)
    slack = 1e-12
    assert measured.prepare(draft_len, budget + 1) > 0.01 - slack
    if budget > 0:
        assert measured.prepare(draft_len, budget) <= 0.01 + slack


@given(
    coefficients=st.tuples(st.floats(0, 1e-2), st.floats(0, 1e-3), st.floats(1e-6, 1e-4)),
)
def test_fit_prepare_finds_the_times_again(coefficients):
    start, step, branch = coefficients
    shapes = [(1, 2), (1, 24), (4, 15), (8, 9), (8, 108)]
    measured = [(k, r, start + k * (step + branch * r)) for k, r in shapes]
    got = times(prepare_s=fit_prepare(measured))
    for draft_len, branches, seconds in measured:
        assert got.prepare(draft_len, branches) == pytest.approx(seconds, rel=1e-3)


def test_fit_prepare_has_no_negative_times():
    falling = [(1, 2, 0.03), (1, 24, 0.02), (8, 9, 0.01), (8, 108, 0.005)]
    assert min(fit_prepare(falling)) >= 0


def test_a_wider_pass_bounds_the_narrower_ones():
    assert without_delays([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 1.0, 2.0, 4.0, 4.0, 6.0)


def outcomes_of(ranks, draft_len, num_ranks):
    """Counted one by one: `ranks[i, j]` is the draft's rank of the target's token j of text i."""
    accepted = np.zeros(draft_len + 1, int)
    hits = np.zeros((draft_len + 1, num_ranks), int)
    for text in ranks:
        stands = next((j for j in range(draft_len) if text[j] != 0), draft_len)
        accepted[stands] += 1
        guess = text[stands] - (stands < draft_len)  # the drafted token itself is no guess there
        if guess < num_ranks:
            hits[stands, guess] += 1
    return Outcomes(accepted=accepted, hits_by_rank=hits, lookups=len(ranks))


@given(seed=st.integers(0, 1000), draft_len=st.integers(1, 6))
def test_shortened_outcomes_are_those_of_shorter_drafts(seed, draft_len):
    ranks = np.random.default_rng(seed).geometric(0.5, (200, 7)) - 1
    got = shorten(outcomes_of(ranks, 6, 4), draft_len, foretold=True)
    expected = outcomes_of(ranks, draft_len, 4)
    np.testing.assert_array_equal(got.accepted, expected.accepted)
    np.testing.assert_array_equal(got.hits_by_rank, expected.hits_by_rank)
    assert got.lookups == expected.lookups


def test_shortened_outcomes_of_another_drafter_keep_the_ranks_behind_whole_drafts():
    ranks = np.random.default_rng(0).geometric(0.6, (4000, 7)) - 1
    got = shorten(outcomes_of(ranks, 6, 4), 2, foretold=False)
    expected = outcomes_of(ranks, 2, 4)
    np.testing.assert_array_equal(got.accepted, expected.accepted)
    np.testing.assert_array_equal(got.hits_by_rank[:2], expected.hits_by_rank[:2])
    shares = (hits[2] / expected.accepted[2] for hits in (got.hits_by_rank, expected.hits_by_rank))
    np.testing.assert_allclose(*shares, atol=0.1)


def behaviour(draft_len=2, num_ranks=3, seed=0):
    rng = np.random.default_rng(seed)
    first, second = (
        outcomes_of(rng.geometric(share, (500, draft_len + 1)) - 1, draft_len, num_ranks)
        for share in (0.7, 0.4)
    )
    return Behaviour(after_hit=first, after_miss=second, foretold=(True, True))


def test_predict_all_finds_the_best_fan_outs_of_every_budget():
    own = behaviour()
    measured = times(verify_s=(0.01, 0.011, 0.012), prepare_s=(0.001, 0.0005, 0.0008))
    predictions = predict_all(measured, {"neural": own})
    assert len(predictions) == 2 * 3 + 3 * 3  # a budget for each guess that was counted
    for one in predictions:
        short = own.shortened(one.setting.draft_len)
        budget = one.setting.fan_out.num_branches
        lists = [
            counts
            for counts in itertools.product(range(4), repeat=one.setting.draft_len + 1)
            if sum(counts) == budget
        ]
        best = max(
            predict(
                measured,
                short,
                dataclasses.replace(one.setting, fan_out=FanOut(after_hit=x, after_miss=y)),
            ).hit_rate
            for x, y in itertools.product(lists, lists)
        )
        assert one.hit_rate == pytest.approx(best)


def test_choose_takes_the_fastest_and_of_equals_the_smallest():
    own = behaviour()
    measured = times(verify_s=(0.01, 0.011, 0.012), neural_s=(0.001, 0.002), ngram_s=0.0005)
    predictions = predict_all(measured, {"neural": own, "ngram": own})
    best = choose(predictions)
    assert best.tokens_per_s == max(one.tokens_per_s for one in predictions)
    assert best.setting.fallback == "ngram"  # as good and faster
    as_fast = [one for one in predictions if one.tokens_per_s == best.tokens_per_s]
    assert best.setting.fan_out.num_branches == min(
        one.setting.fan_out.num_branches for one in as_fast
    )


@pytest.mark.parametrize(("gain", "waits"), [(1.01, False), (1.1, True)])
def test_choose_lets_the_target_wait_only_for_a_clear_gain(gain, waits):
    fits = predict_rate(times(prepare_s=(0.009, 0, 0)), setting(), 0.5, 2.0)
    late = predict_rate(times(prepare_s=(0.011, 0, 0)), setting(), 0.5, 2.0 * 1.1 * gain)
    assert late.tokens_per_s == pytest.approx(gain * fits.tokens_per_s)
    assert (gain > WAIT_MUST_GAIN) == waits
    assert choose([fits, late]).target_waits == waits


def test_read_outcomes_follows_the_layout_of_the_tree():
    fan_out = FanOut(after_hit=(2, 0, 1), after_miss=(1, 1, 2))
    depth, rank = branch_layout(fan_out.after_miss, fan_out.num_branches)
    counts = LookupCounts(
        lookups=(20, 9),
        hits=(10, 6),
        found_at=((1, 2, 3, 4), (3, 2, 1, 0)),
        accepted=((8, 7, 6), (5, 3, 1)),
    )
    after_miss = read_outcomes([counts, counts], fan_out, after_hit=False)
    for branch, found in enumerate((1, 2, 3, 4)):
        assert after_miss.hits_by_rank[depth[branch], rank[branch]] == 2 * found
    assert after_miss.lookups == 40
    assert after_miss.hit_rate(fan_out.after_miss) == 0.5
    after_hit = read_outcomes([counts], fan_out, after_hit=True)
    np.testing.assert_array_equal(after_hit.hits_by_rank, [[3, 2], [0, 0], [1, 0]])
    assert after_hit.hit_rate((1, 0, 1)) == pytest.approx(4 / 9)
    assert after_hit.tokens_per_round == pytest.approx(1 + (3 + 2) / 9)


def test_a_tuned_file_says_what_was_written(tmp_path):
    path = tmp_path / "tuned.toml"
    write_tuned(path, tuned())
    assert read_tuned(path) == tuned()
    assert [entry.name for entry in tmp_path.iterdir()] == ["tuned.toml"]
    assert all(line.startswith("#") for line in path.read_text().splitlines()[:2])


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("schema = 1", "schema = 2", "should have schema = 1, got 2"),
        ("schema = 1", "", "should have schema = 1, got None"),
        ("schema = 1", "schema = true", "should have schema = 1, got True"),
        ("draft_len = 2", "draft_len = 2\nhurry = 1", r"\[choice\] knows no hurry"),
        ("draft_len = 2\n", "", r"\[choice\] lacks draft_len"),
        ("draft_len = 2", "draft_len = 0", "from 1 to 64"),
        ("draft_len = 2", "draft_len = 2.0", "choice.draft_len must be a whole number"),
        ("draft_len = 2", "draft_len = true", "choice.draft_len must be a whole number"),
        ("draft_len = 2", "draft_len = 3", r"has 4 numbers \(.*\), got 3"),
        ("[3, 0, 2]", "[3, -1, 2]", "choice.fan_out_after_hit must be .*, got -1 in"),
        ("[3, 0, 2]", "3", "choice.fan_out_after_hit must be a list"),
        ('"ngram"', '"guessing"', "fallback must be one of neural, ngram, got 'guessing'"),
        ("miss_weight = 0.5", "miss_weight = 1.5", "miss_weight must be a .* from 0 to 1, got 1.5"),
        ("lookup_s = 0.0", "lookup_s = -1", "Times must be finite seconds"),
        ("lookup_s = 0.0", "lookup_s = nan", "times.lookup_s must be a finite float32 number"),
        ("[0.001, 1.1e-05, 0.002]", "[0.001]", "two numbers at least for verify_s"),
        ('"rejection"', '"hope"', "measured.verification must be one of"),
        ("[times]", "[hours]", "the file knows no hours"),
        ("[times]", "[times", "should be TOML"),
    ],
)
def test_a_tuned_file_that_is_not_one_is_refused(tmp_path, old, new, fragment):
    path = tmp_path / "tuned.toml"
    write_tuned(path, tuned())
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=fragment):
        read_tuned(path)


def test_a_tuned_file_that_is_absent_or_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tuned(tmp_path / "none.toml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is no regular file"):
        write_tuned(tmp_path / "folder", tuned())
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_predictions_know_who_waits():
    one = Prediction(
        setting=setting(), hit_rate=1, tokens_per_round=3, verify_s=0.1, prepare_s=0.2, round_s=0.2
    )
    assert one.target_waits
    assert one.tokens_per_s == pytest.approx(15)
