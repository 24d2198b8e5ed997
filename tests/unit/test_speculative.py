"""Speculative decoding with a draft model says what plain decoding says, and counts honestly."""

import dataclasses

import numpy as np
import pytest
from speculation_cases import (
    DRAFT_LEN,
    GREEDY,
    HOT,
    NAME,
    OPTIONS,
    PROMPTS,
    SCALES,
    assert_honest_counts,
    assert_same_outputs,
    steps_needed,
    tokenized,
)
from tiny_models import CONFIGS, make_tiny, perturbed, prompt_ids, tiny_tokenizer

from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate, stream
from ssd_jax.sampling_params import SamplingParams

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
                steps, drafted = steps_needed(len(completion.token_ids), draft_len)
                counts = completion.speculation
                assert counts.target_steps == steps
                own = counts.drafters["draft"]
                assert own == counts.total
                assert own.num_draft_tokens == own.num_accepted_tokens == drafted
                assert own.acceptance_rate == 1.0
                assert own.mean_acceptance_length == 1 + drafted / own.num_drafts


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
        rates.append(np.mean([c.speculation.total.acceptance_rate for c in completions]))
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
            seen = counts.target_steps, counts.total.num_draft_tokens
            if scale == 0:
                assert seen == steps_needed(limit, DRAFT_LEN)
            if limit == 1:
                assert seen == (1, 0)


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
    for one, other in zip(done, whole, strict=True):
        # Until the host sees a stop string some more rounds are played and counted.
        counts = other.speculation if one.finish_reason == "stop" else one.speculation
        assert dataclasses.replace(one, speculation=counts) == other
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
