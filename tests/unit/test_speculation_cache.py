"""Guessing outcomes and finding them again, against plain Python over random cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.fan_out import FanOut
from ssd_jax.sampling import penalize, sample_tokens, warp
from ssd_jax.speculation_cache import (
    NO_OUTCOME,
    favour_misses,
    guess_outcomes,
    guess_scores,
    look_up,
    no_prepared_drafts,
)
from ssd_jax.types import Draft, PreparedDrafts, Sampling, Verdict

B, J, V, R = 4, 3, 12, 9
FAN_OUTS = [
    FanOut(after_hit=(3, 2, 1, 1), after_miss=(3, 2, 1, 1)),
    FanOut(after_hit=(0, 2, 0, 1), after_miss=(5, 0, 0, 0)),
    FanOut(after_hit=(V, 1, 0, V), after_miss=(0, 0, 0, 1)),
]
SEEDS = st.integers(0, 2**32 - 1)
TEMPERATURES = np.array([0.0, 0.5, 1.0, 2.0], np.float32)


def sampling_of(rng, temperature=TEMPERATURES):
    """Random options, the first row greedy."""
    rows = len(temperature)

    def uniform(low, high, *shape):
        return jnp.asarray(rng.uniform(low, high, (rows, *shape)).astype(np.float32))

    return Sampling(
        temperature=jnp.asarray(temperature),
        top_k=jnp.asarray(rng.integers(0, V, rows), jnp.int32),
        top_p=uniform(0.5, 1.0),
        min_p=uniform(0.0, 0.1),
        repetition_penalty=uniform(0.8, 1.5),
        presence_penalty=uniform(-0.5, 0.5),
        frequency_penalty=uniform(-0.5, 0.5),
        logit_bias=uniform(-1.0, 1.0, V),
        prompt_tokens=jnp.asarray(rng.random((rows, V)) < 0.3),
        seed=jnp.asarray(rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)),
        eos_ids=jnp.full((rows, 4), -1, jnp.int32),
        max_length=jnp.full(rows, 100, jnp.int32),
    )


@pytest.mark.parametrize("fan_out", FAN_OUTS)
@given(seed=SEEDS)
@settings(max_examples=30)
def test_guesses_are_the_best_tokens_that_may_follow(fan_out, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((B, J + 1, V)).astype(np.float32)
    tokens = rng.integers(0, V, (B, J), dtype=np.int32)
    count = rng.integers(0, J + 1, B, dtype=np.int32)
    after_hit = rng.random(B) < 0.5
    draft = Draft(tokens=tokens, count=count, law=None, drafter=np.zeros(B, np.int32))
    num_branches = fan_out.num_branches + 2  # more of them than there are outcomes to guess
    guess = _jitted(guess_outcomes, fan_out, num_branches)
    depth, bonus_token = map(np.asarray, guess(scores, draft, after_hit))
    assert depth.shape == bonus_token.shape == (B, num_branches)
    for row in range(B):
        expected = []
        for j, guesses in enumerate(fan_out.after_hit if after_hit[row] else fan_out.after_miss):
            by_score = sorted(range(V), key=lambda token: -scores[row, j, token])
            if j < count[row]:  # behind the draft's last token, any token may follow
                by_score.remove(tokens[row, j])
                by_score.append(tokens[row, j])
            expected += [(j, token) for token in by_score[:guesses]]
        got = list(zip(depth[row].tolist(), bonus_token[row].tolist(), strict=True))
        assert got[: len(expected)] == expected
        assert len(set(expected)) == len(expected)
        assert np.all(depth[row, len(expected) :] == NO_OUTCOME)


@given(seed=SEEDS)
@settings(max_examples=30)
def test_an_outcome_is_found_where_it_was_prepared_and_nowhere_else(seed):
    rng = np.random.default_rng(seed)
    # Keys of a row differ; some branches are for no outcome.
    keys = [[divmod(key, V) for key in rng.permutation((J + 1) * V)[:R]] for _ in range(B)]
    num_accepted = np.array([[j for j, _ in row] for row in keys], np.int32)
    num_accepted[rng.random((B, R)) < 0.3] = NO_OUTCOME
    prepared = PreparedDrafts(
        num_accepted=num_accepted,
        bonus_token=np.array([[token for _, token in row] for row in keys], np.int32),
        tokens=rng.integers(0, V, (B, R, J), dtype=np.int32),
        law=rng.standard_normal((B, R, J, V)).astype(np.float32),
    )
    wanted = [row[rng.integers(R)] for row in keys]
    for row in range(B):
        if rng.random() < 0.4:
            wanted[row] = (int(rng.integers(-1, J + 1)), int(rng.integers(V)))
    verdict = Verdict(
        num_accepted=np.array([j for j, _ in wanted], np.int32),
        bonus_token=np.array([token for _, token in wanted], np.int32),
    )
    found, branch, tokens, law = jax.device_get(_jitted(look_up)(prepared, verdict))
    for row in range(B):
        table = {
            (int(j), token): place
            for place, (j, (_, token)) in enumerate(zip(num_accepted[row], keys[row], strict=True))
        }
        place = table.get(wanted[row])
        assert found[row] == (place is not None)
        if place is not None:
            assert branch[row] == place
            np.testing.assert_array_equal(tokens[row], prepared.tokens[row, place])
            np.testing.assert_array_equal(law[row], prepared.law[row, place])


@pytest.mark.parametrize("with_law", [True, False])
def test_nothing_is_found_in_an_empty_cache(with_law):
    empty = no_prepared_drafts(B, R, J, V, with_law=with_law)
    for num_accepted in range(-1, J + 1):
        for token in (0, 5):
            verdict = Verdict(
                num_accepted=np.full(B, num_accepted, np.int32),
                bonus_token=np.full(B, token, np.int32),
            )
            found, _, tokens, law = _jitted(look_up)(empty, verdict)
            assert not np.any(found)
            assert tokens.shape == (B, J)
            assert (law is not None) == with_law


@given(seed=SEEDS)
@settings(max_examples=25)
def test_the_best_guess_is_what_the_target_would_choose_by_the_same_logits(seed):
    rng = np.random.default_rng(seed)
    sampling = sampling_of(rng)
    logits = (3 * rng.standard_normal((B, V))).astype(np.float32)
    counts = rng.integers(0, 3, (B, V), dtype=np.int32)
    positions = rng.integers(0, 99, B, dtype=np.int32)
    scores = np.asarray(_jitted(guess_scores)(logits, sampling, counts, positions))
    law = _jitted(warp)(logits, sampling, counts)
    chosen = np.asarray(_jitted(sample_tokens)(law, sampling, positions))
    np.testing.assert_array_equal(np.argmax(scores, axis=-1), chosen)
    penalized = _jitted(penalize)(logits, sampling, counts)
    np.testing.assert_array_equal(scores[0], penalized[0])  # so that greedy rows rank all tokens
    assert np.all(np.isneginf(scores[1:]) == np.isneginf(np.asarray(law)[1:]))
    alone = dataclasses.replace(sampling, temperature=jnp.zeros(B, jnp.float32))
    np.testing.assert_allclose(
        _jitted(guess_scores)(logits, alone, counts, positions), penalized, rtol=1e-6
    )


def reweighted(law, guesses, weight):
    """Definition 14 on one law, float64: the guessed tokens and the drafted one, times `weight`."""
    law = np.exp(np.asarray(law, np.float64))
    top = np.argsort(-law, kind="stable")[: guesses + 1]
    scaled = law.copy()
    scaled[top] *= weight
    return scaled / scaled.sum() if scaled.sum() > 0 else law


COUNTS = (3, 1, 0, 2)


@given(seed=SEEDS, position=st.integers(0, J))
@settings(max_examples=25)
def test_favouring_misses_is_its_definition(seed, position):
    rng = np.random.default_rng(seed)
    sampling = sampling_of(rng)
    logits = (2 * rng.standard_normal((B, V))).astype(np.float32)
    law = np.asarray(_jitted(warp)(logits, sampling, np.zeros((B, V), np.int32)))
    by_weight = {
        weight: np.exp(np.asarray(_favoured(weight)(law, np.int32(position), sampling), np.float64))
        for weight in (1.0, 0.5, 0.1, 0.0)
    }
    for row in range(B):
        masses = []
        top = np.argsort(-law[row], kind="stable")[: COUNTS[position] + 1]
        for weight, got in by_weight.items():
            expected = reweighted(law[row], COUNTS[position], 1.0 if row == 0 else weight)
            np.testing.assert_allclose(got[row], expected, atol=2e-6)
            assert got[row].sum() == pytest.approx(1, abs=1e-5)
            masses.append(got[row, top].sum())
        assert masses == sorted(masses, reverse=True) or np.ptp(masses) < 1e-6


def test_a_law_within_the_guesses_stays_as_it_is():
    """With weight 0 nothing would be left of it."""
    sampling = sampling_of(np.random.default_rng(0))
    law = np.full((B, V), -np.inf, np.float32)
    law[:, [2, 7]] = np.log(np.float32(0.5))
    for position in (0, 1, 3):
        got = _favoured(0.0)(law, np.int32(position), sampling)
        np.testing.assert_array_equal(got, law)


@functools.cache
def _jitted(function, *static):
    return jax.jit(functools.partial(function, *static))


@functools.cache
def _favoured(weight):
    return jax.jit(
        lambda law, position, sampling: favour_misses(law, COUNTS, position, weight, sampling)
    )
