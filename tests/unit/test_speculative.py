"""Speculative decoding against plain decoding: same tokens, same law, sound caches, honest counts.

Most tests share one target, draft configuration and batch size, so that one program serves them
all; every batch of theirs asks for log-probabilities in one row for the same reason.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import scipy.stats
from tiny_models import (
    CONFIGS,
    FAMILY_NAMES,
    make_tiny,
    perturbed,
    prompt_ids,
    reference_law,
    tiny,
    tiny_tokenizer,
)

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.finish import Finish
from ssd_jax.decoding.speculative import decode_speculative
from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.engine.method import make_drafter, speculative
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate, stream
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams

NAME = "qwen3"
DRAFT_LEN = 4
FALSE_ALARM = 1e-6  # rate at which correct decoding would fail each chi-square test
SCALES = (0.0, 0.1, 3.0)  # noise on the draft's weights: the target itself, a good draft, a bad one

PROMPTS = [prompt_ids(1), prompt_ids(7), prompt_ids(16), prompt_ids(17)]
GREEDY = SamplingParams(max_tokens=24, seed=0, logprobs=3)
OPTIONS = [
    GREEDY,
    SamplingParams(max_tokens=21, seed=1, repetition_penalty=1.3, presence_penalty=0.5, min_p=0.1),
    SamplingParams(
        max_tokens=23, temperature=1.3, seed=2**64 - 1, top_p=0.9, frequency_penalty=0.4, logprobs=2
    ),
    SamplingParams(
        max_tokens=16,
        temperature=0.7,
        seed=5,
        min_p=0.05,
        top_k=30,
        logit_bias={3: 2.0, 4: -np.inf},
    ),
]
HOT = [SamplingParams(max_tokens=20, temperature=1.5, seed=i, logprobs=i + 1) for i in range(4)]


def tokenized(name: str = NAME) -> Model:
    return dataclasses.replace(tiny(name).model, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def model():
    return tokenized()


@pytest.fixture(scope="module")
def drafts(model):
    return {scale: perturbed(model, scale) for scale in SCALES}


def assert_same_outputs(completions, plain):
    """All fields but the statistics; log-probabilities up to rounding."""
    for one, other in zip(completions, plain, strict=True):
        bare = dataclasses.replace(one, speculation=None, logprobs=None)
        assert bare == dataclasses.replace(other, logprobs=None)
        assert (one.logprobs is None) == (other.logprobs is None)
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            np.testing.assert_allclose(
                [value for _, value in mine.top], [value for _, value in theirs.top], atol=1e-5
            )


def assert_honest_counts(completion, draft_len):
    """Of an output that no stop string cut: only its last round may have lost its bonus token."""
    counts = completion.speculation
    assert 0 <= counts.accepted <= counts.drafted <= draft_len * counts.target_steps
    assert len(counts.accepted_at) == draft_len
    assert sum(counts.accepted_at) == counts.accepted
    assert list(counts.accepted_at) == sorted(counts.accepted_at, reverse=True)
    lost = counts.accepted + counts.target_steps - len(completion.token_ids)
    assert lost in ((0, 1) if completion.finish_reason == "eos" else (0,))


def steps_needed(num_tokens, draft_len):
    """Target passes and drafted tokens for an output whose every drafted token is accepted."""
    steps = drafted = 0
    while num_tokens:
        count = min(draft_len, num_tokens - 1)
        num_tokens -= count + 1
        steps, drafted = steps + 1, drafted + count
    return steps, drafted


PAIRS = [
    ("llama", "llama", 1),
    ("llama_tied", "llama_tied", 2),
    ("llama3_rope", "qwen2", 7),
    ("qwen2", "qwen2", 16),
    ("qwen3", "qwen3", DRAFT_LEN),
]


@pytest.mark.parametrize(("target", "drafter", "draft_len"), PAIRS)
def test_every_family_says_what_it_says_without_speculation(target, drafter, draft_len):
    model = tokenized(target)
    plain = generate(model, PROMPTS, OPTIONS)
    for scale in SCALES:
        speculation = Speculation(draft=perturbed(tokenized(drafter), scale), draft_len=draft_len)
        completions = generate(model, PROMPTS, OPTIONS, speculation=speculation)
        assert_same_outputs(completions, plain)
        for completion in completions:
            assert_honest_counts(completion, draft_len)
            if target == drafter and scale == 0:
                counts = completion.speculation
                expected = steps_needed(len(completion.token_ids), draft_len)
                assert (counts.target_steps, counts.drafted) == expected
                assert counts.accepted == counts.drafted
                assert counts.acceptance_rate == 1.0


@pytest.mark.parametrize("options", [GREEDY, *HOT[:2]], ids=["greedy", "hot", "other seed"])
def test_batches_of_one_kind(model, drafts, options):
    """A batch of greedy rows alone takes shortcuts of its own."""
    plain = generate(model, PROMPTS, options)
    for draft in drafts.values():
        speculation = Speculation(draft=draft, draft_len=DRAFT_LEN)
        assert_same_outputs(generate(model, PROMPTS, options, speculation=speculation), plain)


def test_drafts_of_all_qualities_were_tried(model, drafts):
    rates = []
    for scale in SCALES:
        speculation = Speculation(draft=drafts[scale], draft_len=DRAFT_LEN)
        completions = generate(model, PROMPTS, HOT, speculation=speculation)
        rates.append(np.mean([c.speculation.acceptance_rate for c in completions]))
    assert rates[0] == 1
    assert 0.2 < rates[1] < 0.98
    assert rates[2] < 0.3


def test_greedy_rows_are_the_same_under_rejection(model, drafts):
    plain = generate(model, PROMPTS, OPTIONS)
    for draft in drafts.values():
        speculation = Speculation(draft=draft, draft_len=DRAFT_LEN, verification="rejection")
        completions = generate(model, PROMPTS, OPTIONS, speculation=speculation)
        assert_same_outputs(completions[:2], plain[:2])
        for completion, expected in zip(completions, plain, strict=True):
            assert_honest_counts(completion, DRAFT_LEN)
            assert len(completion.token_ids) == len(expected.token_ids)
        again = generate(model, PROMPTS, OPTIONS, speculation=speculation)
        assert again == completions


@pytest.mark.parametrize("scale", SCALES[:2])
@pytest.mark.parametrize("sampled", [False, True])
def test_eos_at_every_position(model, drafts, scale, sampled):
    base = HOT[0] if sampled else GREEDY
    (ids,) = {c.token_ids for c in generate(model, [PROMPTS[1]] * 4, base)}
    speculation = Speculation(draft=drafts[scale], draft_len=DRAFT_LEN)
    for start in range(0, 16, 4):
        ends = [ids[start + row] for row in range(4)]
        options = [dataclasses.replace(base, stop_token_ids=(end,)) for end in ends]
        completions = generate(model, [PROMPTS[1]] * 4, options, speculation=speculation)
        for completion, end in zip(completions, ends, strict=True):
            assert completion.token_ids == ids[: ids.index(end) + 1]
            assert completion.finish_reason == "eos"
            assert completion.text == tiny_tokenizer().decode(completion.token_ids[:-1])
            assert len(completion.logprobs) == len(completion.token_ids)
            assert_honest_counts(completion, DRAFT_LEN)


@pytest.mark.parametrize("scale", SCALES)
def test_stop_strings_cut_where_plain_decoding_cuts(model, drafts, scale):
    speculation = Speculation(draft=drafts[scale], draft_len=DRAFT_LEN)
    text = generate(model, [PROMPTS[1]] * 4, HOT)[0].text
    for length in (1, 2, 3):
        stops = [text[start : start + length] for start in (0, 3, 7, 11)]
        options = [
            dataclasses.replace(HOT[0], stop=(stop, "not in the text"), max_tokens=19)
            for stop in stops
        ]
        plain = generate(model, [PROMPTS[1]] * 4, options)
        assert {completion.finish_reason for completion in plain} == {"stop"}
        completions = generate(model, [PROMPTS[1]] * 4, options, speculation=speculation)
        assert_same_outputs(completions, plain)


@pytest.mark.parametrize("scale", SCALES)
def test_any_number_of_tokens(model, drafts, scale):
    speculation = Speculation(draft=drafts[scale], draft_len=DRAFT_LEN)
    (whole,) = {c.token_ids for c in generate(model, [PROMPTS[1]] * 4, GREEDY)}
    for first in (1, 5, 9):
        limits = range(first, first + 4)
        options = [dataclasses.replace(GREEDY, max_tokens=limit) for limit in limits]
        completions = generate(model, [PROMPTS[1]] * 4, options, speculation=speculation)
        for completion, limit in zip(completions, limits, strict=True):
            assert completion.token_ids == whole[:limit]
            assert completion.finish_reason == "length"
            assert_honest_counts(completion, DRAFT_LEN)
            counts = completion.speculation
            if scale == 0:
                expected = steps_needed(limit, DRAFT_LEN)
                assert (counts.target_steps, counts.drafted) == expected
            if limit == 1:
                assert (counts.target_steps, counts.drafted, counts.accepted) == (1, 0, 0)


def test_a_text_fills_the_context_exactly():
    """With as many slots as the context has tokens, the last drafts would not fit."""
    config = dataclasses.replace(CONFIGS[NAME], max_context=128, num_layers=1)
    naive = make_tiny(config)
    small = naive.model
    prompts = [prompt_ids(length) for length in (127, 126, 123, 110)]
    expected = [tuple(naive.continuation(prompt, 128 - len(prompt))) for prompt in prompts]
    for scale in SCALES:
        speculation = Speculation(draft=perturbed(small, scale), draft_len=DRAFT_LEN)
        completions = generate(small, prompts, speculation=speculation)
        assert [completion.token_ids for completion in completions] == expected
        for completion in completions:
            assert completion.finish_reason == "length"
            assert_honest_counts(completion, DRAFT_LEN)


@pytest.mark.parametrize("stop", [(), ("e", "T", "é")])
def test_pieces_of_a_stream_add_up_to_what_generate_gives(model, drafts, stop):
    speculation = Speculation(draft=drafts[0.1], draft_len=DRAFT_LEN)
    options = [dataclasses.replace(params, stop=stop) for params in OPTIONS]
    texts, ids, done = [""] * 4, [()] * 4, [None] * 4
    for delta in stream(model, PROMPTS, options, speculation=speculation):
        assert done[delta.row] is None
        texts[delta.row] += delta.text
        ids[delta.row] += delta.token_ids
        done[delta.row] = delta.completion
    whole = generate(model, PROMPTS, options, speculation=speculation)
    assert done == whole
    assert texts == [completion.text for completion in whole]
    assert ids == [completion.token_ids for completion in whole]


def test_a_row_does_not_depend_on_its_neighbours(model, drafts):
    speculation = Speculation(draft=drafts[0.1], draft_len=DRAFT_LEN, verification="rejection")
    together = generate(model, PROMPTS, OPTIONS, speculation=speculation)
    turned = generate(
        model,
        [*PROMPTS[1:], prompt_ids(12)],
        [*OPTIONS[1:], SamplingParams(max_tokens=3)],
        speculation=speculation,
    )
    for one, other in zip(together[1:], turned, strict=False):
        assert (one.token_ids, one.speculation) == (other.token_ids, other.speculation)


def batch_of(model, prompts, options, draft_len=DRAFT_LEN):
    return make_batch(model, make_requests(model, prompts, options), draft_len=draft_len)


def assert_equal_caches(cache, fresh, lengths):
    """Slots below `lengths` of two caches, row by row."""
    for ours, theirs in zip(cache.keys + cache.values, fresh.keys + fresh.values, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                ours[row, :, :length], theirs[row, :, :length], rtol=1e-5, atol=1e-5
            )


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
        tokens = np.asarray(state.target.tokens)
        texts = [tokens[row, :length].tolist() for row, length in enumerate(lengths)]
        fresh = method.prefill(batch_of(model, texts, SamplingParams(max_tokens=1)))
        np.testing.assert_array_equal(state.target.cache.lengths, lengths - 1)
        assert_equal_caches(state.target.cache, fresh.target.cache, lengths - 1)
        behind = lengths - 1 - np.asarray(state.drafter.lengths)
        assert set(behind.tolist()) <= {0, 1}
        assert_equal_caches(state.drafter, fresh.drafter, state.drafter.lengths)
    seen = set(gains)
    if scale == 0:
        assert DRAFT_LEN + 1 in seen
        assert np.all(state.target.finish == Finish.LENGTH)
    elif scale == SCALES[1]:
        assert {1, DRAFT_LEN + 1} < seen
    else:
        assert 1 in seen


TINY_VOCABULARY = ModelConfig(
    family="llama",
    vocab_size=5,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_context=64,
)
NUM_ROWS = 4096
LAWS = {
    "plain": SamplingParams(max_tokens=5, temperature=1.0),
    "warped": SamplingParams(
        max_tokens=4, temperature=1.4, top_k=4, frequency_penalty=0.5, logit_bias={2: 0.7}
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_rejection_samples_the_targets_law(name):
    """The joint law of three tokens, from the target alone, over rounds of two drafted ones."""
    target, params, prompt = make_tiny(TINY_VOCABULARY), LAWS[name], [1, 3]
    expected = np.ones((5, 5, 5))
    for text in itertools.chain.from_iterable(
        itertools.product(range(5), repeat=count) for count in range(3)
    ):
        logits = target.logits([*prompt, *text])[-1]
        law = np.exp(reference_law(logits, params, prompt, text))
        expected[text] *= law.reshape(-1, *[1] * (2 - len(text)))
    assert expected.sum() == pytest.approx(1)
    options = [dataclasses.replace(params, seed=(9 << 40) + row) for row in range(NUM_ROWS)]
    draft = perturbed(target.model, 0.7)
    speculation = Speculation(draft=draft, draft_len=2, verification="rejection")
    completions = generate(target.model, [prompt] * NUM_ROWS, options, speculation=speculation)
    observed = np.zeros((5, 5, 5))
    for completion in completions:
        observed[completion.token_ids[:3]] += 1
    assert 0.1 < np.mean([c.speculation.acceptance_rate for c in completions]) < 0.8
    expected, observed = expected.ravel() * NUM_ROWS, observed.ravel()
    assert not observed[expected == 0].any()
    rare = expected < 5
    observed = np.array([*observed[~rare], observed[rare].sum()])
    expected = np.array([*expected[~rare], expected[rare].sum()])
    assert scipy.stats.chisquare(observed, expected).pvalue > FALSE_ALARM


def test_nothing_is_compiled_for_other_options_or_lengths(model, drafts, compilations):
    speculation = Speculation(draft=drafts[0.1], draft_len=DRAFT_LEN)
    runs = (generate, lambda *args, **kwargs: list(stream(*args, **kwargs)))
    for run in runs:
        run(model, PROMPTS, dataclasses.replace(GREEDY, stop=("zzz",)), speculation=speculation)
    jax.jit(lambda x: x * 5 + 2)(np.float32(1))
    assert len(compilations) >= 1  # the counter counts
    size = decode_speculative._cache_size()
    compilations.clear()
    others = [
        OPTIONS,
        HOT,
        [dataclasses.replace(params, stop=("a", "b"), stop_token_ids=(1, 2)) for params in OPTIONS],
        [SamplingParams(max_tokens=90, seed=0, logprobs=4), *OPTIONS[1:]],
    ]
    for first, options in zip((2, 3, 5, 9), others, strict=True):
        prompts = [prompt_ids(length) for length in (first, 17, 4, 1)]
        for scale, run in zip((0.0, 3.0), runs, strict=True):
            other = Speculation(draft=drafts[scale], draft_len=DRAFT_LEN)
            run(model, prompts, options, speculation=other)
    assert compilations == []
    assert decode_speculative._cache_size() == size


def test_decoding_moves_nothing_between_host_and_device(model, drafts):
    batch = batch_of(model, PROMPTS, OPTIONS)
    draft = drafts[0.1]
    speculation = Speculation(draft=draft, draft_len=DRAFT_LEN)
    state = speculative(model, speculation).prefill(batch)
    old, num_rounds = jax.tree.leaves(state), jax.device_put(np.int32(30))
    with jax.transfer_guard("disallow"):
        state = decode_speculative(
            model.config,
            model.params,
            make_drafter(speculation),
            draft.params,
            batch.sampling,
            state,
            num_rounds,
            verification="coupled",
        )
    assert all(leaf.is_deleted() for leaf in old)
    assert state.target.finish.tolist() == [Finish.LENGTH] * 4
    tokens = np.asarray(state.target.tokens)
    for row, completion in enumerate(generate(model, PROMPTS, OPTIONS)):
        start = len(PROMPTS[row])
        end = start + len(completion.token_ids)
        assert tuple(tokens[row, start:end].tolist()) == completion.token_ids


def test_finished_and_padding_rows_do_nothing_while_others_go_on(model, drafts):
    method = speculative(model, Speculation(draft=drafts[0.1], draft_len=DRAFT_LEN))
    batch = batch_of(model, PROMPTS[:3], OPTIONS[:3])
    state = method.advance(batch, method.prefill(batch), 2)
    state = method.stop(state, np.array([True, False, False, False]))

    def still(state):
        target, stats = method.view(state)
        return jax.device_get(
            (target.tokens, target.lengths, target.output_counts, target.finish, stats)
        )

    before = still(state)
    after = still(method.advance(batch, state, 30))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one[[0, 3]], other[[0, 3]])
    assert after[3].tolist() == [Finish.STOP, Finish.LENGTH, Finish.LENGTH, Finish.STOP]
    assert np.all(after[1][1:3] > before[1][1:3])


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("draft_len", [1, 2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize("target", FAMILY_NAMES)
def test_all_families_draft_lengths_and_verifications(target, draft_len, verification):
    jax.clear_caches()  # each case compiles anew, and a process holds only so many programs
    model = tokenized(target)
    options = OPTIONS if verification == "coupled" else OPTIONS[:2] * 2
    options = [dataclasses.replace(params, max_tokens=80) for params in options]
    plain = generate(model, PROMPTS, options)
    for drafter in {target, "llama", "qwen3"}:
        for scale in SCALES:
            speculation = Speculation(
                draft=perturbed(tokenized(drafter), scale),
                draft_len=draft_len,
                verification=verification,
            )
            completions = generate(model, PROMPTS, options, speculation=speculation)
            assert_same_outputs(completions, plain)
            for completion in completions:
                assert_honest_counts(completion, draft_len)
