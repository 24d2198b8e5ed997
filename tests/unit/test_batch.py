"""Requests, their arrays, and how often the programs that take them are compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tiny_models import prompt_ids, tiny, tiny_tokenizer
from tokenizers import models

from ssd_jax.decoding.autoregressive import decode
from ssd_jax.decoding.emission import stop_rows
from ssd_jax.decoding.finish import Finish
from ssd_jax.decoding.prefill import prefill_chunk
from ssd_jax.decoding.state import initial_state
from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.errors import RequestError
from ssd_jax.generation import generate, stream
from ssd_jax.sampling_params import SamplingParams

NAME = "qwen3"


@pytest.fixture(scope="module")
def bare():
    return tiny(NAME).model


@pytest.fixture(scope="module")
def model(bare):
    return dataclasses.replace(bare, tokenizer=tiny_tokenizer((58, 3)))


def batch_of(model, prompts, params=None):
    params = params or SamplingParams(max_tokens=4)
    return make_batch(model, make_requests(model, prompts, params))


def test_arrays_of_a_padded_batch(model):
    options = [
        SamplingParams(max_tokens=4, seed=(7 << 32) + 9, logit_bias={5: 1.5}),
        SamplingParams(max_tokens=50, temperature=0.5, stop_token_ids=(1, 3)),
        SamplingParams(max_tokens=2, ignore_eos=True),
    ]
    prompts = [[4, 5, 5], [6], [9, 8, 7, 6]]
    batch = batch_of(model, prompts, options)
    assert batch.tokens.shape == (4, 128)
    for row, prompt in enumerate(prompts):
        assert batch.tokens[row, : len(prompt)].tolist() == prompt
        assert np.flatnonzero(batch.sampling.prompt_tokens[row]).tolist() == sorted(set(prompt))
    assert batch.lengths.tolist() == [3, 1, 4, 1]
    assert batch.finish.tolist() == [Finish.RUNNING] * 3 + [Finish.STOP]
    assert batch.sampling.max_length[:3].tolist() == [7, 51, 6]
    assert batch.max_steps == 50
    assert batch.chunks == ((0, 16),)
    assert batch.num_top_logprobs is None
    assert batch.sampling.seed[0].tolist() == [7, 9]
    assert batch.sampling.temperature.tolist() == [0.0, 0.5, 0.0, 0.0]
    assert [sorted(set(ids) - {-1}) for ids in batch.sampling.eos_ids.tolist()[:3]] == [
        [3, 58],
        [1, 3, 58],
        [],
    ]
    bias = np.asarray(batch.sampling.logit_bias)
    assert bias[0, 5] == 1.5
    assert np.isneginf(bias[:, model.tokenizer.vocab_size :]).all()
    assert np.count_nonzero(bias[:, : model.tokenizer.vocab_size]) == 1


def test_an_id_that_the_tokenizer_knows_is_never_banned(bare):
    """Ids may have gaps: their number says nothing about the largest."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5, "?": 40}, unk_token="?"))
    tokenizer = dataclasses.replace(tiny_tokenizer(), backend=backend)
    batch = batch_of(dataclasses.replace(bare, tokenizer=tokenizer), [[0, 5]])
    bias = np.asarray(batch.sampling.logit_bias)[0]
    assert bias[[0, 5, 40]].tolist() == [0.0, 0.0, 0.0]
    assert np.isneginf(bias[41:]).all()


@pytest.mark.parametrize("length", [1, 2, 16, 17, 126, 512, 513, 514, 600, 1000])
def test_prefill_fits_the_slots_and_leaves_the_last_token_to_decode(bare, length):
    batch = batch_of(bare, [prompt_ids(length)], SamplingParams(max_tokens=1))
    covered = [t for start, size in batch.chunks for t in range(start, start + size)]
    assert covered[: length - 1] == list(range(length - 1))
    assert len(covered) <= batch.tokens.shape[1]
    assert length + 1 <= batch.tokens.shape[1]


@pytest.mark.parametrize(("asked", "kept"), [([None, None], None), ([None, 0], 0), ([3, None], 4)])
def test_room_for_logprobs(bare, asked, kept):
    params = [SamplingParams(max_tokens=1, logprobs=count) for count in asked]
    assert batch_of(bare, [[1], [2]], params).num_top_logprobs == kept


def test_top_logprobs_never_exceed_the_vocabulary(bare):
    small = dataclasses.replace(bare, config=dataclasses.replace(bare.config, vocab_size=50))
    batch = batch_of(small, [[1]], SamplingParams(max_tokens=1, logprobs=64))
    assert batch.num_top_logprobs == 50


def test_text_prompts_are_encoded(model):
    (request,) = make_requests(model, ["Heab"], SamplingParams())
    assert list(request.prompt_ids) == model.tokenizer.encode("Heab")


REFUSED = [
    ("bare", ["text"], {}, ["no tokenizer"]),
    ("bare", "text", {}, ["list"]),
    ("bare", [], {}, ["one prompt at least", "0 prompts"]),
    ("model", [""], {}, ["empty"]),
    ("bare", [[]], {}, ["empty"]),
    ("bare", [[1, 64]], {}, ["0 to 63", "got 64"]),
    ("bare", [[-1]], {}, ["0 to 63", "got -1"]),
    ("bare", [[1]], {"logit_bias": {70: 1.0}}, ["0 to 63", "got 70"]),
    ("bare", [[1]], {"stop_token_ids": (99,)}, ["0 to 63", "got 99"]),
    ("bare", [[1]], {"stop_token_ids": (-1,)}, ["from 0 to", "got -1"]),
    ("bare", [[1] * 1024], {}, ["1024 tokens", "1023"]),
    ("bare", [[1] * 2000], {"max_tokens": 1}, ["2000 tokens", "1024"]),
    ("bare", [[1] * 1000], {"max_tokens": 25}, ["1000 tokens", "max_tokens 25", "to 24"]),
    ("bare", [[1]], {"stop": ("a",)}, ["Stop strings", "tokenizer"]),
]


@pytest.mark.parametrize(("which", "prompts", "options", "words"), REFUSED)
@pytest.mark.parametrize("run", [generate, stream])
def test_bad_requests_are_refused_at_once_and_in_words(
    request, which, prompts, options, words, run
):
    with pytest.raises(RequestError) as caught:
        run(request.getfixturevalue(which), prompts, SamplingParams(**options))
    for word in words:
        assert word in str(caught.value)


def test_there_must_be_as_many_options_as_prompts(bare):
    with pytest.raises(RequestError, match="2 prompts and 3 SamplingParams"):
        generate(bare, [[1], [2]], [SamplingParams()] * 3)


def test_the_counter_of_compilations_counts(compilations):
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    assert len(compilations) == 1


OTHER_OPTIONS = [
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=90, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=1),
    SamplingParams(max_tokens=5, repetition_penalty=1.1, presence_penalty=1.0),
    SamplingParams(max_tokens=30, frequency_penalty=0.2, logit_bias={1: 1.0}, ignore_eos=True),
    SamplingParams(max_tokens=7, stop=("a", "b"), stop_token_ids=(1, 2)),
]


def test_nothing_is_compiled_after_the_first_request_of_a_size(model, compilations):
    for run in (generate, lambda *args: list(stream(*args))):
        run(model, [prompt_ids(20)], SamplingParams(max_tokens=10, stop=("zzz",)))
    programs = (decode, prefill_chunk, initial_state, stop_rows)
    sizes = [program._cache_size() for program in programs]
    compilations.clear()
    for length, options in zip([18, 20, 25, 30, 33], OTHER_OPTIONS, strict=True):
        generate(model, [prompt_ids(length)], options)
        list(stream(model, [prompt_ids(length, seed=1)], options))
    assert compilations == []
    assert [program._cache_size() for program in programs] == sizes


def prefilled(model, batch):
    state = initial_state(
        model.config,
        batch.tokens,
        batch.lengths,
        batch.finish,
        dtype=model.params.embedding.dtype,
        num_top_logprobs=batch.num_top_logprobs,
    )
    cache = state.cache
    for start, size in batch.chunks:
        tokens = jnp.asarray(batch.tokens[:, start : start + size])
        cache = prefill_chunk(model.config, model.params, tokens, cache, np.int32(start))
    return state.replace(cache=cache)


def test_decoding_moves_nothing_between_host_and_device(bare):
    batch = batch_of(bare, [prompt_ids(20)], SamplingParams(max_tokens=10))
    state, num_steps = prefilled(bare, batch), jax.device_put(np.int32(10))
    with jax.transfer_guard("disallow"):
        state = decode(bare.config, bare.params, batch.sampling, state, num_steps)
    expected = generate(bare, [prompt_ids(20)], SamplingParams(max_tokens=10))[0].token_ids
    assert tuple(state.tokens[0, 20:30].tolist()) == expected
    assert state.finish.tolist() == [Finish.LENGTH]


def test_the_old_state_is_consumed(bare):
    batch = batch_of(bare, [prompt_ids(20)])
    state = prefilled(bare, batch)
    decode(bare.config, bare.params, batch.sampling, state, np.int32(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.tokens)


def test_prefill_consumes_the_old_cache(bare):
    batch = batch_of(bare, [prompt_ids(20)])
    state = initial_state(
        bare.config,
        batch.tokens,
        batch.lengths,
        batch.finish,
        dtype=jnp.float32,
        num_top_logprobs=None,
    )
    tokens = jnp.asarray(batch.tokens[:, :32])
    prefill_chunk(bare.config, bare.params, tokens, state.cache, np.int32(0))
    assert all(leaf.is_deleted() for leaf in (*state.cache.keys, *state.cache.values))


def test_any_cut_of_the_steps_gives_the_same_state(bare):
    batch = batch_of(bare, [prompt_ids(20)], SamplingParams(max_tokens=9, temperature=1.0, seed=4))
    whole = decode(bare.config, bare.params, batch.sampling, prefilled(bare, batch), np.int32(100))
    state = prefilled(bare, batch)
    for steps in (1, 0, 3, 5):
        running = state.finish
        state = decode(bare.config, bare.params, batch.sampling, state, np.int32(steps))
        assert running.is_deleted()
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(state.cache.lengths, state.lengths - 1)


def test_finished_and_padding_rows_emit_nothing_while_others_go_on(bare):
    prompts = [prompt_ids(20), prompt_ids(7), prompt_ids(9)]
    batch = batch_of(bare, prompts, SamplingParams(max_tokens=9))
    state = decode(bare.config, bare.params, batch.sampling, prefilled(bare, batch), np.int32(2))
    state = stop_rows(state, np.array([True, False, False, False]))
    before = jax.device_get((state.tokens, state.lengths, state.output_counts))
    state = decode(bare.config, bare.params, batch.sampling, state, np.int32(5))
    after = jax.device_get((state.tokens, state.lengths, state.output_counts))
    assert after[1].tolist() == [22, 14, 16, 1]
    assert state.finish.tolist() == [Finish.STOP, Finish.RUNNING, Finish.RUNNING, Finish.STOP]
    assert state.cache.lengths.tolist() == [21, 13, 15, 0]
    assert after[2].sum(axis=1).tolist() == [2, 7, 7, 0]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[[0, 3]], other[[0, 3]])


def test_the_host_cannot_end_a_row_twice(bare):
    batch = batch_of(bare, [prompt_ids(20)], SamplingParams(max_tokens=1))
    state = decode(bare.config, bare.params, batch.sampling, prefilled(bare, batch), np.int32(1))
    assert stop_rows(state, np.array([True])).finish.tolist() == [Finish.LENGTH]
