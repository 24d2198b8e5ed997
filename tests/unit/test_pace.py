"""Draft lengths from measured times, against the same rules told one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssd_jax.drafting import pace as pacing
from ssd_jax.drafting.pace import MEMORY, PRIOR_ACCEPTANCE, ROUNDS_UNTIL_PROBE
from ssd_jax.types import Draft, Pace

P, B, J = 2, 5, 6
CLEAR = 1e-4  # closer rates than this (relative) are too close to call in float32

draft_limits = jax.jit(pacing.draft_limits)
update_pace = jax.jit(pacing.update_pace)
MANY = settings(max_examples=80)


def random_pace(rng, num_drafters=P, rows=B):
    tried = rng.uniform(0.1, 30, (num_drafters, rows))
    accepted = tried * rng.choice([0.0, 1.0, rng.random()], (num_drafters, rows))
    return Pace(
        tried=jnp.asarray(tried.astype(np.float32)),
        accepted=jnp.asarray(accepted.astype(np.float32)),
        idle=jnp.asarray(rng.integers(0, 2 * ROUNDS_UNTIL_PROBE, (num_drafters, rows), np.int32)),
    )


def random_times(rng, num_drafters=P):
    """A plain step costs the same for all; drafts cost anything, some lengths are not to be had."""
    each = rng.uniform(0, rng.choice([0.05, 0.5, 3.0]), (num_drafters, J))
    seconds = np.cumsum(np.concatenate([np.ones((num_drafters, 1)), each], axis=1), axis=1)
    shortest_refused = rng.integers(1, 2 * J, num_drafters)
    seconds[np.arange(J + 1) >= shortest_refused[:, None]] = np.inf
    return seconds.astype(np.float32)


def expected_limit(pace, seconds, drafter, row):
    """The limit of one drafter in one row, and by how much its choices were won."""
    best, margins = [], []
    for p in range(len(seconds)):
        tried, accepted = float(pace.tried[p, row]), float(pace.accepted[p, row])
        rate = accepted / tried
        speeds = [sum(rate**j for j in range(k + 1)) / float(seconds[p, k]) for k in range(J + 1)]
        winner = max(range(J + 1), key=lambda k: speeds[k])  # the shortest of equals
        others = [speed for k, speed in enumerate(speeds) if k != winner]
        best.append((speeds[winner], winner))
        if p == drafter:
            margins.append(1 - max(others) / speeds[winner])
    speed, limit = best[drafter]
    for other, _ in best[drafter + 1 :]:
        margins.append(abs(1 - other / speed) or np.inf)
        if other > speed:
            limit = 0
    if limit == 0 and pace.idle[drafter, row] >= ROUNDS_UNTIL_PROBE:
        limit = 1
    return limit, min(margins)


@MANY
@given(st.integers(0, 2**32))
def test_limits_are_those_that_yield_most_tokens_a_second(seed):
    rng = np.random.default_rng(seed)
    pace, seconds = random_pace(rng), random_times(rng)
    limits = np.asarray(draft_limits(pace, seconds))
    assert limits.shape == (P, B)
    assert limits.min() >= 0
    assert limits.max() <= J
    for drafter in range(P):
        for row in range(B):
            limit, margin = expected_limit(pace, seconds, drafter, row)
            if margin > CLEAR:
                assert limits[drafter, row] == limit


@MANY
@given(st.integers(0, 2**32))
def test_the_pace_counts_judged_tokens_and_forgets(seed):
    rng = np.random.default_rng(seed)
    pace = random_pace(rng)
    count = rng.integers(0, J + 1, B).astype(np.int32)
    accepted = np.minimum(rng.integers(0, J + 1, B), count).astype(np.int32)
    drafter, running = rng.integers(0, P, B).astype(np.int32), rng.random(B) < 0.8
    draft = Draft(tokens=jnp.zeros((B, J), jnp.int32), count=count, law=None, drafter=drafter)
    after = update_pace(pace, draft, accepted, running)
    for p in range(P):
        for row in range(B):
            tried, stood = float(pace.tried[p, row]), float(pace.accepted[p, row])
            idle = int(pace.idle[p, row]) + int(running[row])
            if running[row] and count[row] > 0 and drafter[row] == p:
                judged = accepted[row] + (1 if accepted[row] < count[row] else 0)
                tried, stood, idle = MEMORY * tried + judged, MEMORY * stood + accepted[row], 0
            assert after.tried[p, row] == pytest.approx(tried, rel=1e-6)
            assert after.accepted[p, row] == pytest.approx(stood, rel=1e-6)
            assert after.idle[p, row] == idle


@MANY
@given(st.integers(0, 2**32))
def test_a_rows_limit_does_not_depend_on_its_neighbours(seed):
    rng = np.random.default_rng(seed)
    pace, other, seconds = random_pace(rng), random_pace(rng), random_times(rng)
    limits = np.asarray(draft_limits(pace, seconds))
    mixed = jax.tree.map(lambda one, two: two.at[:, 3].set(one[:, 1]), pace, other)
    np.testing.assert_array_equal(np.asarray(draft_limits(mixed, seconds))[:, 3], limits[:, 1])


def play(seconds, accepts, rounds):
    """Limits of each round for one drafter and row; accepts(round, drafted) is how many stand."""
    pace, limits = pacing.init_pace(1, 1), []
    for number in range(rounds):
        limit = int(draft_limits(pace, seconds)[0, 0])
        limits.append(limit)
        count = jnp.array([limit], jnp.int32)
        draft = Draft(tokens=jnp.zeros((1, J), jnp.int32), count=count, law=None, drafter=count * 0)
        stood = jnp.array([accepts(number, limit)], jnp.int32)
        pace = update_pace(pace, draft, stood, jnp.array([True]))
    return limits


@settings(max_examples=4)
@given(st.floats(0.05, 0.5))
def test_drafting_that_never_helps_stops_and_is_tried_again_now_and_then(cost):
    seconds = np.float32(1 + cost * np.arange(J + 1))[None]
    limits = play(seconds, lambda number, drafted: 0, 140)
    assert limits[0] > 0 or cost > PRIOR_ACCEPTANCE
    assert 0 in limits
    start = limits.index(0)
    probes = [number for number in range(start, 140) if limits[number] > 0]
    assert all(limits[number] == 1 for number in probes)
    gaps = np.diff([start - 1, *probes])
    assert len(probes) >= 3
    assert set(gaps.tolist()) == {ROUNDS_UNTIL_PROBE + 1}


def test_drafting_that_helps_again_is_taken_up_again():
    seconds = np.float32(1 + 0.2 * np.arange(J + 1))[None]
    limits = play(seconds, lambda number, drafted: drafted if number >= 60 else 0, 160)
    assert 0 in limits[:60]
    assert limits[-1] == J
    assert play(seconds, lambda number, drafted: drafted, 30)[-1] == J


def test_of_two_drafters_the_better_one_drafts():
    pace = pacing.init_pace(2, 2)
    pace = Pace(
        tried=jnp.full((2, 2), 100.0),
        accepted=jnp.array([[90.0, 5.0], [50.0, 50.0]]),
        idle=pace.idle,
    )
    seconds = np.float32(1 + 0.1 * np.arange(J + 1)) * np.ones((2, 1), np.float32)
    limits = np.asarray(draft_limits(pace, seconds))
    assert limits[0, 0] > 0
    assert limits[0, 1] == 0
    assert limits[1, 1] > 0


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_faster_machines_choose_the_same(seed):
    """Only ratios of times matter."""
    rng = np.random.default_rng(seed)
    pace, seconds = random_pace(rng), random_times(rng)
    margins = [expected_limit(pace, seconds, p, row)[1] for p in range(P) for row in range(B)]
    assume(min(margins) > CLEAR)
    np.testing.assert_array_equal(draft_limits(pace, seconds), draft_limits(pace, seconds / 8))
