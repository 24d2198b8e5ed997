"""What tests of speculation share: models, batches, and when two outputs are the same.

Most of them use one target, draft configuration and batch size, so that one program serves them
all; every batch of theirs asks for log-probabilities in one row for the same reason.
"""

import dataclasses

import numpy as np
import pytest
from tiny_models import prompt_ids, tiny, tiny_tokenizer

from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams

NAME = "qwen3"
DRAFT_LEN = 4
FALSE_ALARM = 1e-6  # rate at which correct decoding would fail each statistical test
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
    """A tiny model with a tokenizer."""
    return dataclasses.replace(tiny(name).model, tokenizer=tiny_tokenizer())


def with_times(speculation: Speculation, *seconds) -> Speculation:
    """The speculation with a round's seconds as functions of the drafted tokens, one a drafter."""
    lengths = range(speculation.longest_draft + 1)
    times = RoundTimes(seconds=tuple(tuple(map(of, lengths)) for of in seconds))
    return dataclasses.replace(speculation, round_times=times)


def assert_same_outputs(completions, plain, *, exactly=False):
    """All fields but the statistics; log-probabilities up to rounding unless told `exactly`.

    A pass of 65 tokens rounds otherwise than a pass of one: differences of 2e-5 were seen.
    """
    tolerance = 0.0 if exactly else 5e-5
    for one, other in zip(completions, plain, strict=True):
        bare = dataclasses.replace(one, speculation=None, logprobs=None)
        assert bare == dataclasses.replace(other, speculation=None, logprobs=None)
        assert (one.logprobs is None) == (other.logprobs is None)
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=tolerance, rel=0)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            np.testing.assert_allclose(
                [value for _, value in mine.top],
                [value for _, value in theirs.top],
                atol=tolerance,
                rtol=0,
            )


def assert_honest_counts(completion, draft_len):
    """Of an output that no stop string cut: only its last round may have lost its bonus token."""
    counts = completion.speculation
    for own in (*counts.drafters.values(), counts.total):
        per_pos = own.num_accepted_tokens_per_pos
        assert 0 <= own.num_accepted_tokens <= own.num_draft_tokens <= draft_len * own.num_drafts
        assert own.num_drafts <= min(counts.target_steps, own.num_draft_tokens)
        assert len(per_pos) == draft_len
        assert sum(per_pos) == own.num_accepted_tokens
        assert list(per_pos) == sorted(per_pos, reverse=True)
        assert max(per_pos) <= own.num_drafts
    accepted = counts.total.num_accepted_tokens
    lost = accepted + counts.target_steps - len(completion.token_ids)
    assert lost in ((0, 1) if completion.finish_reason in ("eos", "error") else (0,))


def steps_needed(num_tokens, draft_len):
    """Target passes and drafted tokens for an output whose every drafted token is accepted."""
    steps = drafted = 0
    while num_tokens:
        count = min(draft_len, num_tokens - 1)
        num_tokens -= count + 1
        steps, drafted = steps + 1, drafted + count
    return steps, drafted


def batch_of(model, prompts, options, draft_len=DRAFT_LEN):
    """A batch with room for drafts of that length."""
    return make_batch(model, make_requests(model, prompts, options), draft_len=draft_len)


def texts_of(state):
    """The texts of a speculative state, row by row."""
    tokens, lengths = np.asarray(state.target.tokens), np.asarray(state.target.lengths)
    return [tokens[row, :length].tolist() for row, length in enumerate(lengths)]


def assert_equal_caches(cache, fresh, lengths):
    """Slots below `lengths` of two caches, row by row.

    Entries reach 15, and passes of other widths add in another order: 1e-5 is the rounding of one.
    """
    for ours, theirs in zip(cache.keys + cache.values, fresh.keys + fresh.values, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                ours[row, :, :length], theirs[row, :, :length], rtol=1e-5, atol=5e-5
            )
