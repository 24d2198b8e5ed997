"""How many guesses go where: closed forms against searches, refusals by name."""

import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from ssd_jax.errors import RequestError
from ssd_jax.fan_out import (
    FanOut,
    branch_layout,
    geometric_fan_out,
    geometric_shares,
    measured_fan_out,
    uniform_fan_out,
)

COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=9)

# Seven drafted tokens, 24 guesses: acceptance, decay, the shares, the chance of a miss (and that of
# three guesses for each length).
TABLE = [
    (0.7, 1.0, (4.91, 4.11, 3.44, 2.87, 2.41, 2.01, 1.68, 2.57), 0.299, 0.333),
    (0.8, 0.5, (4.20, 3.62, 3.12, 2.69, 2.32, 2.00, 1.72, 4.34), 0.557, 0.577),
    (0.8, 1.0, (3.90, 3.49, 3.12, 2.79, 2.49, 2.23, 2.00, 3.99), 0.316, 0.333),
    (0.8, 1.5, (3.71, 3.40, 3.11, 2.84, 2.60, 2.38, 2.17, 3.79), 0.180, 0.192),
    (0.9, 1.0, (2.93, 2.78, 2.64, 2.50, 2.37, 2.25, 2.13, 6.40), 0.280, 0.333),
]


def miss_rate(shares, acceptance, decay):
    """The chance of a miss, summed length by length."""
    draft_len = len(shares) - 1
    lengths = [acceptance**k * (1 - acceptance) for k in range(draft_len)] + [acceptance**draft_len]
    return sum(w * f**-decay for w, f in zip(lengths, shares, strict=True))


@given(COUNTS, st.integers(0, 5))
def test_a_layout_lists_every_guess_once_in_order(counts, spare):
    num_branches = sum(counts) + spare
    depth, rank = branch_layout(counts, num_branches)
    assert depth.shape == rank.shape == (num_branches,)
    assert depth.dtype == rank.dtype == np.int32
    pairs = list(zip(depth.tolist(), rank.tolist(), strict=True))
    used, unused = pairs[: sum(counts)], pairs[sum(counts) :]
    assert used == sorted(set(used))
    assert [sum(d == j for d, _ in used) for j in range(len(counts))] == counts
    assert all(r < counts[d] for d, r in used)
    assert unused == [(-2, 0)] * spare


@pytest.mark.parametrize(("acceptance", "decay", "shares", "miss", "uniform"), TABLE)
def test_the_published_closed_form_gives_its_table(acceptance, decay, shares, miss, uniform):
    got = geometric_shares(7, 24, acceptance, decay)
    assert [round(float(share), 2) for share in got] == list(shares)
    assert round(miss_rate(got, acceptance, decay), 3) == miss
    assert round(miss_rate([3] * 8, acceptance, decay), 3) == uniform


@pytest.mark.parametrize(
    ("draft_len", "acceptance", "decay"), [(1, 0.5, 1.0), (3, 0.9, 0.4), (6, 0.6, 1.7)]
)
def test_no_other_shares_miss_less(draft_len, acceptance, decay):
    """Against a numerical minimum over all shares of the same sum."""
    budget = 5.0 * (draft_len + 1)
    shares = geometric_shares(draft_len, budget, acceptance, decay)
    assert shares.sum() == pytest.approx(budget)

    def objective(logits):
        weights = np.exp(logits - logits.max())
        return miss_rate(budget * weights / weights.sum(), acceptance, decay)

    found = scipy.optimize.minimize(objective, np.zeros(draft_len + 1), tol=1e-12)
    assert miss_rate(shares, acceptance, decay) == pytest.approx(found.fun, rel=1e-6)
    weights = np.exp(found.x)
    np.testing.assert_allclose(shares, budget * weights / weights.sum(), rtol=1e-2)


@given(st.integers(1, 16), st.integers(1, 200), st.floats(0.01, 0.99), st.floats(0.1, 3.0))
def test_rounding_keeps_the_sum_and_stays_next_to_the_shares(draft_len, budget, acceptance, decay):
    counts = geometric_fan_out(draft_len, budget, acceptance, decay)
    shares = geometric_shares(draft_len, budget, acceptance, decay)
    assert len(counts) == draft_len + 1
    assert sum(counts) == budget
    assert all(isinstance(count, int) for count in counts)
    assert np.all(np.abs(np.array(counts) - shares) < 1)


@given(
    st.integers(1, 3).flatmap(
        lambda depths: st.integers(1, 4).flatmap(
            lambda ranks: st.tuples(
                st.lists(
                    st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks).map(
                        lambda row: sorted(row, reverse=True)
                    ),
                    min_size=depths,
                    max_size=depths,
                ),
                st.integers(0, depths * ranks),
            )
        )
    )
)
def test_a_measured_fan_out_hits_as_often_as_any(case):
    histogram, budget = np.array(case[0]), case[1]
    counts = measured_fan_out(histogram, budget)
    num_depths, num_ranks = histogram.shape
    sizes = itertools.product(range(num_ranks + 1), repeat=num_depths)

    def hits(counts):
        return sum(histogram[j, :count].sum() for j, count in enumerate(counts))

    assert sum(counts) == budget
    assert hits(counts) == max(hits(size) for size in sizes if sum(size) == budget)


def test_a_lucky_late_rank_buys_no_early_ones():
    """Ranks are made non-increasing: a guess behind a useless one is as useless."""
    assert measured_fan_out(np.array([[0, 90], [5, 4]]), 2) == (0, 2)


def test_sums_of_a_fan_out():
    fan_out = FanOut(after_hit=(3, 2, 0), after_miss=(7, 0, 0))
    assert (fan_out.num_branches, fan_out.most_guesses) == (7, 7)
    assert uniform_fan_out(3, 2) == (2, 2, 2, 2)


BAD_LISTS = [(), (0, 0), (1, -1), (1, 2.0), (True, 1), ("1", 2)]


@pytest.mark.parametrize("counts", BAD_LISTS)
def test_bad_lists_are_refused(counts):
    for both in ((counts, (1,) * len(counts)), ((1,) * len(counts), counts)):
        with pytest.raises(RequestError, match=r"fan-out must be .*whole number.* from 0 .*, got "):
            FanOut(after_hit=both[0], after_miss=both[1])


def test_lists_of_two_lengths_are_refused():
    with pytest.raises(RequestError, match=r"of one length .* got 2 and 3 numbers"):
        FanOut(after_hit=(1, 1), after_miss=(1, 1, 1))


@pytest.mark.parametrize(
    ("budget", "acceptance", "decay"), [(0, 0.5, 1), (8, 0, 1), (8, 1, 1), (8, 0.5, 0)]
)
def test_a_law_that_is_none_is_refused(budget, acceptance, decay):
    with pytest.raises(RequestError, match="A geometric fan-out needs"):
        geometric_fan_out(3, budget, acceptance, decay)


def test_more_guesses_than_ranks_are_refused():
    with pytest.raises(RequestError, match=r"A budget of 7 guesses .* got 2 depths of 3 ranks"):
        measured_fan_out(np.ones((2, 3)), 7)
