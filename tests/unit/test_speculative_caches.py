"""What both caches hold after any round: what a fresh prefill of the text would put there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation_cases import (
    DRAFT_LEN,
    OPTIONS,
    PROMPTS,
    SCALES,
    assert_equal_caches,
    batch_of,
    texts_of,
    with_times,
)
from tiny_models import prompt_ids

from ssd_jax.decoding.finish import Finish
from ssd_jax.decoding.speculative import draft_room
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.method import prefill_drafter, speculative
from ssd_jax.engine.speculation import Speculation
from ssd_jax.sampling_params import SamplingParams


def is_running(state):
    return np.asarray(state.target.finish) == Finish.RUNNING


@pytest.mark.parametrize("scale", SCALES)
def test_both_caches_always_equal_a_fresh_prefill(model, drafts, scale):
    method = speculative(model, Speculation(draft=drafts[scale], draft_len=DRAFT_LEN))
    batch = batch_of(model, PROMPTS, OPTIONS)
    state = method.prefill(batch)
    gains = []
    for _ in range(7):
        before = np.asarray(state.target.lengths)
        state = method.advance(batch, state, 1)
        lengths = np.asarray(state.target.lengths)
        gains.extend(lengths - before)
        fresh = method.prefill(batch_of(model, texts_of(state), SamplingParams(max_tokens=1)))
        np.testing.assert_array_equal(state.target.cache.lengths, lengths - 1)
        assert_equal_caches(state.target.cache, fresh.target.cache, lengths - 1)
        known = np.asarray(state.drafter.lengths)
        assert set((lengths - 1 - known)[is_running(state)].tolist()) <= {0, 1}
        assert_equal_caches(state.drafter, fresh.drafter, np.minimum(known, lengths - 1))
    seen = set(gains)
    if scale == 0:
        assert DRAFT_LEN + 1 in seen
        assert np.all(state.target.finish == Finish.LENGTH)
    elif scale == SCALES[1]:
        assert {1, DRAFT_LEN + 1} < seen
    else:
        assert 1 in seen


NGRAM = NgramConfig(n=1, max_draft=8)
RESTING = [  # prompts that repeat and others; their longest text fills all slots that there are
    (prompt_ids(1), SamplingParams(max_tokens=60, seed=0)),
    (prompt_ids(5) * 2, SamplingParams(max_tokens=64, seed=1, temperature=0.8)),
    (prompt_ids(60), SamplingParams(max_tokens=60, seed=2, temperature=1.2)),
    (prompt_ids(17), SamplingParams(max_tokens=50, seed=3, temperature=0.3)),
]
MOST_ROUNDS = 120


def costly(count):
    """Seconds of a round: drafting pays where most drafted tokens are accepted, and only there."""
    return 1 + 0.4 * count


def set_pace(state, on):
    """The state as if drafts of rows that are `on` had always been accepted, else never."""
    tried = jnp.full(state.pace.tried.shape, 1e4)
    accepted = jnp.where(jnp.asarray(on), tried, 0)
    idle = jnp.zeros_like(state.pace.idle)
    pace = dataclasses.replace(state.pace, tried=tried, accepted=accepted, idle=idle)
    return dataclasses.replace(state, pace=pace)


def same_proposals(one, other, running):
    """Whether two drafts propose the same in the running rows."""
    for row in np.flatnonzero(running):
        count = int(one.count[row])
        assert other.count[row] == count
        if count:
            assert one.drafter[row] == other.drafter[row]
            np.testing.assert_array_equal(one.tokens[row, :count], other.tokens[row, :count])


@pytest.mark.parametrize("combined", [False, True])
def test_rows_that_rest_and_draft_again_have_no_holes(model, drafts, combined):
    """Drafting is switched on and off row by row, now and then for longer than a chunk of text."""
    ngram = NGRAM if combined else None
    speculation = Speculation(draft=drafts[0.1], ngram=ngram, draft_len=DRAFT_LEN)
    names = speculation.drafter.names
    speculation = with_times(speculation, *[costly] * len(names))
    method, drafter = speculative(model, speculation), speculation.drafter
    propose = jax.jit(
        lambda target, own: drafter.draft(
            drafts[0.1].params,
            batch.sampling,
            target,
            own,
            jnp.broadcast_to(
                draft_room(batch.sampling, target, drafter.draft_len),
                (len(names), len(batch.lengths)),
            ),
        )[0]
    )
    prompts, options = zip(*RESTING, strict=True)
    batch = batch_of(model, prompts, options, speculation.longest_draft)
    assert batch.tokens.shape[1] == 128
    assert max(map(len, prompts)) + 60 + 8 == 128
    state, rng = method.prefill(batch), np.random.default_rng(0)
    most_behind, proposed = 0, set()
    for number in range(MOST_ROUNDS):
        if not is_running(state).any():
            break
        on = rng.random((len(names), 4)) < (0.0 if 5 <= number % 30 < 27 else 0.4)
        before = np.asarray(state.target.lengths)
        state = method.advance(batch, set_pace(state, on), 1)
        lengths, running = np.asarray(state.target.lengths), is_running(state)
        rested = ~on.any(axis=0)
        assert np.all((lengths - before)[rested] <= 1)
        cache = state.drafter[1] if combined else state.drafter
        read = batch_of(model, texts_of(state), SamplingParams(max_tokens=1), 0)
        fresh = method.prefill(read)
        assert read.tokens.shape == batch.tokens.shape
        np.testing.assert_array_equal(state.target.cache.lengths, lengths - 1)
        assert_equal_caches(state.target.cache, fresh.target.cache, lengths - 1)
        known = np.where(running, np.asarray(cache.lengths), 0)
        own = prefill_drafter(speculation, read)
        assert_equal_caches(cache, own[1] if combined else own, known)
        most_behind = max(most_behind, *(lengths - 1 - known)[running].tolist(), 0)
        again, anew = propose(state.target, state.drafter), propose(state.target, own)
        same_proposals(again, anew, running)
        proposed |= set(np.asarray(again.drafter)[np.asarray(again.count) > 0].tolist())
    assert most_behind > 16
    assert proposed == set(range(len(names)))
    assert np.all(np.asarray(state.target.finish) == Finish.LENGTH)
    log = np.asarray(state.stats.rounds)
    assert all(log[..., 1][log[..., 0] == 1 + index].sum() > 0 for index in range(len(names)))
