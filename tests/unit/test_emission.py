"""The pieces of a speculative round: emitting, recording, counting along a draft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_jax.decoding import emission, speculative
from ssd_jax.decoding.finish import Finish
from ssd_jax.drafting.draft_model import match_vocabulary
from ssd_jax.sampling import counts_along_draft, over_positions, reported_logprobs, warp
from ssd_jax.types import (
    NO_TOKEN,
    DecodeState,
    Draft,
    KVCache,
    Logprobs,
    Sampling,
    SpeculationStats,
)

B, S, T, V = 3, 12, 4, 6

emit = jax.jit(emission.emit)
write_where = jax.jit(emission.write_where)
record_logprobs = jax.jit(emission.record_logprobs)
add_round = jax.jit(speculative.add_round)
along_draft = jax.jit(counts_along_draft)


def make_sampling(max_length=(S,) * B, eos_ids=((-1, -1),) * B, temperature=(0.0,) * B):
    zeros, ones = jnp.zeros(B, jnp.float32), jnp.ones(B, jnp.float32)
    return Sampling(
        temperature=jnp.array(temperature, jnp.float32),
        top_k=jnp.array([0, 3, 2], jnp.int32),
        top_p=jnp.array([1.0, 0.8, 1.0], jnp.float32),
        min_p=zeros,
        repetition_penalty=jnp.array([1.0, 1.3, 1.0], jnp.float32),
        presence_penalty=jnp.array([0.0, 0.5, 1.0], jnp.float32),
        frequency_penalty=ones * 0.25,
        logit_bias=jnp.zeros((B, V), jnp.float32),
        prompt_tokens=jnp.zeros((B, V), bool),
        seed=jnp.zeros((B, 2), jnp.uint32),
        eos_ids=jnp.array(eos_ids, jnp.int32),
        max_length=jnp.array(max_length, jnp.int32),
    )


def make_state(tokens, lengths, finish):
    """A state between steps; its counts are those of the whole text, prompt or not."""
    counts = [np.bincount(row[:n], minlength=V) for row, n in zip(tokens, lengths, strict=True)]
    return DecodeState(
        cache=KVCache(keys=(), values=(), lengths=jnp.asarray(lengths - 1)),
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        finish=jnp.asarray(finish),
        output_counts=jnp.asarray(np.array(counts, np.int32)),
        logprobs=None,
    )


def emitted_one_by_one(text, candidates, eos_ids, max_length):
    """A row's text and why it ended, token after token."""
    text = list(text)
    for token in candidates:
        if len(text) >= max_length:
            break
        if token == NO_TOKEN:
            return text, Finish.ERROR
        text.append(token)
        if token in eos_ids:
            return text, Finish.EOS
    return text, Finish.LENGTH if len(text) >= max_length else Finish.RUNNING


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_emit_is_token_by_token_appending(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    lengths = rng.integers(1, S, B).astype(np.int32)
    finish = rng.choice([Finish.RUNNING, Finish.RUNNING, *Finish], B).astype(np.int32)
    max_length = np.minimum(lengths + rng.integers(1, T + 2, B), S)
    eos_ids = np.where(rng.random((B, 2)) < 0.5, rng.integers(0, V, (B, 2)), -1)
    candidates = rng.integers(0, V, (B, T)).astype(np.int32)
    candidates[rng.random((B, T)) < 0.1] = NO_TOKEN
    num_candidates = rng.integers(1, T + 1, B).astype(np.int32)
    before = make_state(tokens, lengths, finish)
    after = emit(before, make_sampling(max_length, eos_ids), candidates, num_candidates)
    for row in range(B):
        text, ended = tokens[row, : lengths[row]].tolist(), finish[row]
        if ended == Finish.RUNNING:
            allowed = candidates[row, : num_candidates[row]].tolist()
            text, ended = emitted_one_by_one(text, allowed, eos_ids[row], max_length[row])
        assert after.lengths[row] == len(text)
        assert after.tokens[row, : len(text)].tolist() == text
        assert after.tokens[row, len(text) :].tolist() == tokens[row, len(text) :].tolist()
        assert after.finish[row] == ended
        assert after.output_counts[row].tolist() == np.bincount(text, minlength=V).tolist()
    np.testing.assert_array_equal(after.cache.lengths, after.lengths - 1)


@pytest.mark.parametrize("place", range(T))
def test_an_eos_at_each_place_of_the_candidates(place):
    candidates = np.full((B, T), 2, np.int32)
    candidates[:, place] = 5
    before = make_state(np.zeros((B, S), np.int32), np.full(B, 3, np.int32), np.zeros(B, np.int32))
    eos_ids = ((5, -1), (1, 5), (-1, -1))
    after = emit(before, make_sampling(eos_ids=eos_ids), candidates, np.full(B, T, np.int32))
    assert after.lengths.tolist() == [3 + place + 1, 3 + place + 1, 3 + T]
    assert after.finish.tolist() == [Finish.EOS, Finish.EOS, Finish.RUNNING]
    assert after.output_counts[:, 5].tolist() == [1, 1, 1]


@pytest.mark.parametrize("place", range(T))
def test_an_eos_past_the_candidates_or_the_limit_is_not_seen(place):
    candidates = np.full((B, T), 5, np.int32)
    candidates[:, :place] = 2
    before = make_state(np.zeros((B, S), np.int32), np.full(B, 3, np.int32), np.zeros(B, np.int32))
    options = make_sampling(max_length=(S, 3 + place, S), eos_ids=((5, -1),) * B)
    after = emit(before, options, candidates, np.array([place, T, place + 1], np.int32))
    limited = Finish.LENGTH
    assert after.finish.tolist() == [Finish.RUNNING, limited, Finish.EOS]
    assert after.lengths.tolist() == [3 + place, 3 + place, 4 + place]
    assert after.output_counts[:, 5].tolist() == [0, 0, 1]


def test_an_eos_that_fills_the_last_place_counts_as_eos():
    candidates = np.full((B, T), 5, np.int32)
    before = make_state(np.zeros((B, S), np.int32), np.full(B, 3, np.int32), np.zeros(B, np.int32))
    after = emit(
        before,
        make_sampling(max_length=(4,) * B, eos_ids=((5, -1),) * B),
        candidates,
        np.full(B, T, np.int32),
    )
    assert after.finish.tolist() == [Finish.EOS] * B


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("width", [None, 2])
def test_writes_past_the_end_of_a_buffer_are_dropped(dtype, width):
    shape = (B, S) if width is None else (B, S, width)
    buffer = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    values = -1 - np.arange(B * T * (width or 1)).reshape(B, T, *shape[2:]).astype(dtype)
    start = np.array([0, S - 2, S + 3], np.int32)
    mask = np.array([[True, False, True, False], [True] * T, [True] * T])
    expected = buffer.copy()
    for row in range(B):
        for offset in range(T):
            if mask[row, offset] and start[row] + offset < S:
                expected[row, start[row] + offset] = values[row, offset]
    np.testing.assert_array_equal(write_where(buffer, start, mask, values), expected)


def test_logprobs_are_recorded_where_the_tokens_go():
    rng = np.random.default_rng(0)
    shown = np.log(rng.dirichlet(np.ones(V), (B, T))).astype(np.float32)
    candidates = rng.integers(0, V, (B, T)).astype(np.int32)
    start = np.array([1, 5, S - 2], np.int32)
    empty = Logprobs(
        chosen=jnp.full((B, S), 7.0),
        top=jnp.full((B, S, 2), 7.0),
        top_ids=jnp.full((B, S, 2), 7, jnp.int32),
    )
    record = record_logprobs(empty, shown, candidates, start)
    for row in range(B):
        for column in range(S):
            step = column - start[row]
            if not 0 <= step < T:
                assert record.chosen[row, column] == 7.0
                assert record.top_ids[row, column].tolist() == [7, 7]
                continue
            law = shown[row, step]
            best = np.argsort(-law)[:2]
            assert record.chosen[row, column] == law[candidates[row, step]]
            assert record.top_ids[row, column].tolist() == best.tolist()
            assert record.top[row, column].tolist() == law[best].tolist()


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_counts_along_a_draft_are_those_of_each_longer_text(seed):
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 4, (B, V)).astype(np.int32)
    drafted = rng.integers(-1, V, (B, T)).astype(np.int32)  # -1 is nobody's token
    counts = np.asarray(along_draft(before, drafted))
    assert counts.shape == (B, T + 1, V)
    for row in range(B):
        for step in range(T + 1):
            real = drafted[row, :step][drafted[row, :step] >= 0]
            expected = before[row] + np.bincount(real, minlength=V)
            assert counts[row, step].tolist() == expected.tolist()


@pytest.mark.parametrize("function", [warp, reported_logprobs])
def test_over_positions_is_the_function_at_each_position(function):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(B, T, V)).astype(np.float32)
    counts = rng.integers(0, 3, (B, T, V)).astype(np.int32)
    sampling = make_sampling(temperature=(0.0, 0.7, 2.0))
    together = jax.jit(lambda *args: over_positions(function, *args, sampling=sampling))(
        logits, counts
    )
    single = jax.jit(function)
    for step in range(T):
        alone = single(logits[:, step], sampling, counts[:, step])
        np.testing.assert_allclose(together[:, step], alone, atol=1e-6)


@pytest.mark.parametrize("width", [V - 2, V, V + 3])
def test_draft_logits_are_cut_or_padded_to_the_targets_ids(width):
    logits = np.random.default_rng(2).normal(size=(B, width)).astype(np.float32)
    matched = np.asarray(match_vocabulary(jnp.asarray(logits), V))
    shared = min(width, V)
    assert matched.shape == (B, V)
    np.testing.assert_array_equal(matched[:, :shared], logits[:, :shared])
    assert np.isneginf(matched[:, shared:]).all()


def test_the_log_of_rounds_has_running_rows_only():
    """Of two drafters, here the second's drafts in row 0, the first's in rows 1 and 2."""
    earlier = np.random.default_rng(3).integers(0, 9, (B, S, 3)).astype(np.int8)
    draft = Draft(
        tokens=jnp.zeros((B, T), jnp.int32),
        count=jnp.array([T, 0, T], jnp.int32),
        law=None,
        drafter=jnp.array([1, 0, 0], jnp.int32),
    )
    before = make_state(np.zeros((B, S), np.int32), np.array([3, 5, 3]), np.zeros(B, np.int32))
    running = jnp.array([True, True, False])
    num_accepted = jnp.array([4, 0, 2], jnp.int32)
    stats = SpeculationStats(rounds=jnp.asarray(earlier))
    after = np.asarray(add_round(stats, draft, num_accepted, running, before).rounds).copy()
    assert after[0, 3].tolist() == [2, T, 4]
    assert after[1, 5].tolist() == [1, 0, 0]
    after[0, 3], after[1, 5] = earlier[0, 3], earlier[1, 5]
    np.testing.assert_array_equal(after, earlier)
