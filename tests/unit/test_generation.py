"""Whole outputs against naive generation; the arrays and programs in between: test_batch."""

import dataclasses
from unittest.mock import ANY

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    make_tiny,
    prompt_ids,
    reference_law,
    reference_penalties,
    tiny,
    tiny_tokenizer,
)

from ssd_jax import sampling
from ssd_jax.errors import RequestError
from ssd_jax.generation import (
    FEWEST_STEPS,
    MOST_STEPS,
    SECONDS_BETWEEN_LOOKS,
    Completion,
    generate,
    steps_until_look,
    stream,
)
from ssd_jax.sampling_params import SamplingParams

NAME = "qwen3"
NUM_TOKENS = 20
PROMPT = prompt_ids(7, seed=1)
KNOWN = tiny_tokenizer().vocab_size
BANNED = dict.fromkeys(range(KNOWN, 64), -np.inf)  # ids that the tokenizer does not know

MIXED_PROMPTS = [prompt_ids(1), prompt_ids(7), prompt_ids(16), prompt_ids(17)]
MIXED_OPTIONS = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=15, temperature=1.3, seed=2**64 - 1, repetition_penalty=1.2),
    SamplingParams(
        max_tokens=9, temperature=0.8, top_k=20, top_p=0.9, seed=7, frequency_penalty=0.3
    ),
    SamplingParams(max_tokens=13, presence_penalty=1.5, logit_bias={4: 2.0, 5: -np.inf}),
]


@pytest.fixture(scope="module")
def bare():
    return tiny(NAME).model


def make_model(eos_ids=()):
    return dataclasses.replace(tiny(NAME).model, tokenizer=tiny_tokenizer(tuple(eos_ids)))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def greedy_ids():
    """What the model with a tokenizer says after PROMPT."""
    return tiny(NAME).continuation(PROMPT, NUM_TOKENS, SamplingParams(logit_bias=BANNED))


def only(completions):
    (completion,) = completions
    return completion


def noise_of(seed, prompt, num_tokens):
    """The noise of each output token, from its seed and its absolute position."""
    words = jnp.array([[seed >> 32, seed % 2**32]] * num_tokens, jnp.uint32)
    positions = len(prompt) + jnp.arange(num_tokens, dtype=jnp.int32)
    return np.asarray(sampling.gumbel_noise(words, positions, sampling.Purpose.TOKEN, 64))


def naive(prompt, params):
    noise = None
    if params.temperature:
        noise = noise_of(params.seed, prompt, params.max_tokens)
    return tuple(tiny(NAME).continuation(prompt, params.max_tokens, params, noise))


def test_a_ragged_batch_of_unlike_requests_equals_naive_generation(bare):
    completions = generate(bare, MIXED_PROMPTS, MIXED_OPTIONS)
    for completion, prompt, params in zip(completions, MIXED_PROMPTS, MIXED_OPTIONS, strict=True):
        assert completion.token_ids == naive(prompt, params)
        assert completion.finish_reason == "length"
        assert completion.prompt_tokens == len(prompt)
        assert (completion.text, completion.logprobs) == ("", None)


def test_a_row_alone_or_in_other_company_stays_the_same(bare):
    together = generate(bare, MIXED_PROMPTS, MIXED_OPTIONS)
    for row, (prompt, params) in enumerate(zip(MIXED_PROMPTS, MIXED_OPTIONS, strict=True)):
        alone = only(generate(bare, [prompt], params))
        assert alone.token_ids == together[row].token_ids
    backwards = generate(bare, MIXED_PROMPTS[:0:-1], MIXED_OPTIONS[:0:-1])
    assert [c.token_ids for c in backwards] == [c.token_ids for c in together[:0:-1]]


def test_a_seed_is_reported_and_gives_the_output_again(bare):
    options = SamplingParams(max_tokens=15, temperature=2.0)
    prompts = [PROMPT] * 4
    first = generate(bare, prompts, options)
    assert len({completion.seed for completion in first}) == 4
    assert len({completion.token_ids for completion in first}) == 4
    for completion in first:
        assert 0 <= completion.seed < 2**64
    again = [dataclasses.replace(options, seed=completion.seed) for completion in first]
    assert [c.token_ids for c in generate(bare, prompts, again)] == [c.token_ids for c in first]


def test_ids_unknown_to_the_tokenizer_are_never_emitted(model):
    hot = SamplingParams(max_tokens=100, temperature=50.0, seed=1)
    assert max(only(generate(model, [PROMPT], hot)).token_ids) < KNOWN


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("source", ["model", "request", "both"])
def test_eos_at_any_position_ends_a_row(greedy_ids, index, source):
    eos = greedy_ids[index]
    own = {"model": (eos,), "request": (), "both": (eos, 63)}[source]
    asked = {"model": (), "request": (62, eos), "both": (60, 61)}[source]
    options = SamplingParams(max_tokens=NUM_TOKENS, stop_token_ids=asked)
    completion = only(generate(make_model(own), [PROMPT], options))
    expected = greedy_ids[: greedy_ids.index(eos) + 1]
    assert completion.token_ids == tuple(expected)
    assert completion.finish_reason == "eos"
    assert completion.text == tiny_tokenizer().decode(expected[:-1])


def test_ignore_eos_ignores_the_models_ids_alone(greedy_ids):
    model = make_model(greedy_ids[:2])
    options = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    completion = only(generate(model, [PROMPT], options))
    assert (completion.token_ids, completion.finish_reason) == (tuple(greedy_ids), "length")
    last_new = next(i for i in range(9, 0, -1) if greedy_ids[i] not in greedy_ids[:i])
    options = dataclasses.replace(options, stop_token_ids=(greedy_ids[last_new],))
    completion = only(generate(model, [PROMPT], options))
    assert completion.token_ids == tuple(greedy_ids[: last_new + 1])
    assert completion.finish_reason == "eos"


def test_rows_that_end_early_leave_the_others_alone(greedy_ids):
    others = [PROMPT, prompt_ids(12), PROMPT]
    options = [
        SamplingParams(max_tokens=NUM_TOKENS, stop_token_ids=(greedy_ids[2],)),
        SamplingParams(max_tokens=11),
        SamplingParams(max_tokens=NUM_TOKENS),
    ]
    ended, other, full = generate(make_model(), others, options)
    assert ended.token_ids == tuple(greedy_ids[: greedy_ids.index(greedy_ids[2]) + 1])
    assert other.token_ids == naive(others[1], SamplingParams(max_tokens=11, logit_bias=BANNED))
    assert full.token_ids == tuple(greedy_ids)


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 9])
def test_max_tokens(model, greedy_ids, max_tokens):
    for run in (generate, lambda *args: [d.completion for d in stream(*args) if d.completion]):
        completion = only(run(model, [PROMPT], SamplingParams(max_tokens=max_tokens)))
        assert completion.token_ids == tuple(greedy_ids[:max_tokens])
        assert completion.finish_reason == "length"


def test_eos_as_the_last_allowed_token_counts_as_eos(model, greedy_ids):
    count = next(i for i in range(4, 20) if greedy_ids[i] not in greedy_ids[:i]) + 1
    options = SamplingParams(max_tokens=count, stop_token_ids=(greedy_ids[count - 1],))
    completion = only(generate(model, [PROMPT], options))
    assert (len(completion.token_ids), completion.finish_reason) == (count, "eos")


@pytest.mark.parametrize("max_context", [40, 128])
def test_a_text_fills_the_context_exactly(max_context):
    small = make_tiny(dataclasses.replace(tiny(NAME).config, max_context=max_context))
    for room in (1, 8):
        prompt = prompt_ids(max_context - room)
        expected = tuple(small.continuation(prompt, room))
        for max_tokens in (None, room):
            completion = only(
                generate(small.model, [prompt], SamplingParams(max_tokens=max_tokens))
            )
            assert completion.token_ids == expected
            assert completion.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 18, 511, 512, 513, 514, 600])
def test_prompts_around_the_sizes_of_prefill_chunks(bare, length):
    prompt = prompt_ids(length, seed=4)
    options = SamplingParams(max_tokens=3)
    assert only(generate(bare, [prompt], options)).token_ids == naive(prompt, options)


def test_a_short_and_a_very_long_prompt_in_one_batch(bare):
    prompts = [prompt_ids(3), prompt_ids(600)]
    options = SamplingParams(max_tokens=6)
    completions = generate(bare, prompts, options)
    assert [c.token_ids for c in completions] == [naive(prompt, options) for prompt in prompts]


def cut_at(stops, ids):
    """(token ids, text) up to the stop that is complete first, found on ever longer outputs."""
    for count in range(1, len(ids) + 1):
        text = tiny_tokenizer().decode(ids[:count])
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        if ends:
            return tuple(ids[:count]), text[: min(ends)[1]]
    return tuple(ids), tiny_tokenizer().decode(ids)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1, 5, 8, 12])
def test_a_stop_string_cuts_text_and_tokens(model, greedy_ids, start, length):
    text = tiny_tokenizer().decode(greedy_ids)
    stop = text[start : start + length]
    ids, cut = cut_at([stop], greedy_ids)
    options = SamplingParams(max_tokens=NUM_TOKENS, stop=(stop, "not in it"))
    completion = only(generate(model, [PROMPT], options))
    assert (completion.token_ids, completion.text) == (ids, cut)
    assert completion.finish_reason == "stop"


def special(model, token_id):
    """The model, with one more of its tokens as a special one."""
    backend = tokenizers.Tokenizer.from_str(model.tokenizer.backend.to_str())
    backend.add_special_tokens([model.tokenizer.id_to_token(token_id)])
    return dataclasses.replace(
        model, tokenizer=dataclasses.replace(model.tokenizer, backend=backend)
    )


@pytest.mark.parametrize("others", [(), ("not in it",)])
def test_a_stop_string_that_is_a_special_token_stops_by_its_id(model, greedy_ids, others):
    count = next(i for i in range(3, NUM_TOKENS) if greedy_ids[i] not in greedy_ids[:i]) + 1
    marked = special(model, greedy_ids[count - 1])
    stop = marked.tokenizer.id_to_token(greedy_ids[count - 1])
    options = SamplingParams(max_tokens=NUM_TOKENS, stop=(stop, *others))
    completion = only(generate(marked, [PROMPT], options))
    assert completion.token_ids == tuple(greedy_ids[:count])
    assert completion.text == marked.tokenizer.decode(greedy_ids[: count - 1])
    assert completion.finish_reason == "stop"
    assert only(generate(marked, [PROMPT], dataclasses.replace(options, ignore_eos=True))) == (
        dataclasses.replace(completion, seed=ANY)
    )


def test_a_stop_string_with_a_special_token_inside_is_refused(model):
    options = SamplingParams(max_tokens=2, stop=("a</s>",))
    with pytest.raises(RequestError, match=r"'a</s>' holds the special token '</s>'.*ids=\("):
        generate(model, [PROMPT], options)


def test_a_stop_string_that_never_comes_costs_no_text(model, greedy_ids):
    text = tiny_tokenizer().decode(greedy_ids)
    options = SamplingParams(max_tokens=NUM_TOKENS, stop=(text[-3:] + "!", text + text))
    completion = only(generate(model, [PROMPT], options))
    assert (completion.text, completion.finish_reason) == (text, "length")
    assert completion.token_ids == tuple(greedy_ids)


def test_a_stop_string_before_an_eos_wins_and_after_it_is_never_seen(model, greedy_ids):
    text = tiny_tokenizer().decode(greedy_ids)
    late = next(i for i in range(6, 20) if greedy_ids[i] not in greedy_ids[:i])
    options = SamplingParams(
        max_tokens=NUM_TOKENS, stop=(text[1:3],), stop_token_ids=(greedy_ids[late],)
    )
    assert only(generate(model, [PROMPT], options)).finish_reason == "stop"
    ids, _ = cut_at([text[-4:]], greedy_ids)
    assert len(ids) > late + 1
    options = dataclasses.replace(options, stop=(text[-4:],))
    completion = only(generate(model, [PROMPT], options))
    assert completion.finish_reason == "eos"
    assert completion.token_ids == tuple(greedy_ids[: late + 1])


STREAMED = {
    "greedy": SamplingParams(max_tokens=NUM_TOKENS, seed=0),
    "hot": SamplingParams(max_tokens=30, temperature=5.0, seed=3),
    "stop": SamplingParams(max_tokens=30, temperature=5.0, seed=3, stop=("e", "T", "é")),
    "bytes": SamplingParams(
        max_tokens=30, temperature=5.0, seed=3, logit_bias={53: 20.0, 54: 20.0, 0: 20.0}
    ),
}


@pytest.mark.parametrize("name", STREAMED)
def test_pieces_of_a_stream_add_up_to_what_generate_gives(model, name):
    prompts, options = [PROMPT, prompt_ids(12), prompt_ids(3)], STREAMED[name]
    texts, ids = [""] * 3, [()] * 3
    done: list[Completion | None] = [None] * 3
    for delta in stream(model, prompts, options):
        assert done[delta.row] is None
        assert delta.text or delta.token_ids or delta.completion
        texts[delta.row] += delta.text
        ids[delta.row] += delta.token_ids
        done[delta.row] = delta.completion
    whole = generate(model, prompts, options)
    assert done == whole
    assert texts == [completion.text for completion in whole]
    assert ids == [completion.token_ids for completion in whole]
    for completion in whole:
        if completion.finish_reason == "length":
            assert completion.text == model.tokenizer.decode(completion.token_ids)


def test_a_stream_comes_in_pieces_and_can_be_left(model):
    deltas = stream(model, [PROMPT], SamplingParams(max_tokens=NUM_TOKENS))
    first = next(deltas)
    assert len(first.token_ids) == 1
    assert first.completion is None
    deltas.close()


def test_logprobs_are_those_of_the_law(bare):
    prompts = [PROMPT, PROMPT, PROMPT]
    options = [
        SamplingParams(max_tokens=6, logprobs=3, repetition_penalty=1.3, seed=4),
        SamplingParams(max_tokens=6, logprobs=0, temperature=1.5, top_k=9, seed=5),
        SamplingParams(max_tokens=6, seed=6),
    ]
    greedy, sampled, without = completions = generate(bare, prompts, options)
    assert [d.completion for d in stream(bare, prompts, options) if d.completion] == completions
    assert without.logprobs is None
    shown = dataclasses.replace(options[0], temperature=1.0)
    for completion, params in ((greedy, shown), (sampled, options[1])):
        output = list(completion.token_ids)
        assert len(completion.logprobs) == 6
        for step, entry in enumerate(completion.logprobs):
            logits = tiny(NAME).logits([*PROMPT, *output[:step]])[-1]
            law = reference_law(logits, params, PROMPT, output[:step])
            assert entry.token_id == output[step]
            assert entry.logprob == pytest.approx(law[entry.token_id], abs=1e-3)
            best = np.argsort(-law)[: len(entry.top)]
            assert [token for token, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in entry.top], law[best], atol=1e-3)
    assert {len(entry.top) for entry in greedy.logprobs} == {3}
    assert {len(entry.top) for entry in sampled.logprobs} == {0}
    assert [e.top[0][0] for e in greedy.logprobs] == list(greedy.token_ids)


def test_logprobs_of_the_chosen_token_alone(bare):
    completion = only(generate(bare, [PROMPT], SamplingParams(max_tokens=4, logprobs=0)))
    logits = tiny(NAME).logits(PROMPT)[-1]
    expected = reference_penalties(logits, SamplingParams(), [], [])
    expected = expected - np.log(np.exp(expected).sum())
    entry = completion.logprobs[0]
    assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-4)
    assert entry.top == ()


def test_bfloat16_generates(bare):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), bare.params)
    completions = generate(
        dataclasses.replace(bare, params=params), [PROMPT], SamplingParams(max_tokens=5)
    )
    assert len(only(completions).token_ids) == 5


@given(steps=st.integers(1, 64), seconds=st.floats(0, 1e4))
def test_the_host_looks_twenty_times_a_second_within_bounds(steps, seconds):
    chosen = steps_until_look(steps, seconds)
    assert FEWEST_STEPS <= chosen <= MOST_STEPS
    if FEWEST_STEPS < chosen < MOST_STEPS:
        step_s = seconds / steps
        assert abs(chosen * step_s - SECONDS_BETWEEN_LOOKS) <= step_s * 1.001


def spaced_tokenizer():
    """Every token is a word that a space goes in front of, as SentencePiece writes first words."""
    words = [f"\u2581{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return dataclasses.replace(tiny_tokenizer(), backend=backend)


def test_a_reply_is_a_text_by_itself_and_a_completion_goes_on(bare):
    model = dataclasses.replace(bare, tokenizer=spaced_tokenizer())
    options = SamplingParams(max_tokens=4, seed=0)
    completion = only(generate(model, [PROMPT], options))
    reply = only(generate(model, [PROMPT], options, as_reply=True))
    assert reply.token_ids == completion.token_ids
    alone = model.tokenizer.decode(reply.token_ids)
    assert not alone.startswith(" ")
    assert (reply.text, completion.text) == (alone, " " + alone)
    pieces = [delta.text for delta in stream(model, [PROMPT], options, as_reply=True)]
    assert "".join(pieces) == reply.text
    stopped = dataclasses.replace(options, stop=alone[:2])
    assert only(generate(model, [PROMPT], stopped, as_reply=True)).text == ""
    assert only(generate(model, [PROMPT], stopped)).text == " "
    with pytest.raises(RequestError, match="as_reply must be True or False"):
        generate(model, [PROMPT], options, as_reply="yes")
