"""Where outputs of SSD end: at EOS wherever it falls, at limits, at stop strings; and streaming."""

import dataclasses

import pytest
from speculation_cases import (
    DRAFT_LEN,
    GREEDY,
    HOT,
    PROMPTS,
    assert_honest_counts,
    assert_same_outputs,
    steps_needed,
)
from ssd_cases import BAD, CONTEXT, FAIR, GOOD, LONG, ssd, target
from tiny_models import prompt_ids, tiny_tokenizer

from ssd_jax.generation import generate, stream

QUALITIES = (GOOD, FAIR, BAD)


@pytest.mark.parametrize("sampled", [False, True])
def test_eos_at_every_position(sampled):
    """With a perfect draft, every fifth token is a bonus token and the others are drafted."""
    base = HOT[0] if sampled else GREEDY
    (ids,) = {c.token_ids for c in generate(target(), [PROMPTS[1]] * 4, base)}
    ends_of_rounds = set()
    for scale in (GOOD, FAIR):
        for start in range(0, 16, 4):
            ends = [ids[start + row] for row in range(4)]
            params = [dataclasses.replace(base, stop_token_ids=(end,)) for end in ends]
            completions = generate(target(), [PROMPTS[1]] * 4, params, speculation=ssd(scale))
            for completion, end in zip(completions, ends, strict=True):
                place = ids.index(end)
                assert completion.token_ids == ids[: place + 1]
                assert completion.finish_reason == "eos"
                assert completion.text == tiny_tokenizer().decode(completion.token_ids[:-1])
                assert len(completion.logprobs) == place + 1
                assert_honest_counts(completion, DRAFT_LEN)
                ends_of_rounds.add(place % (DRAFT_LEN + 1) == DRAFT_LEN)
    assert ends_of_rounds == {False, True}


@pytest.mark.parametrize("scale", QUALITIES)
def test_any_number_of_tokens(scale):
    (whole,) = {c.token_ids for c in generate(target(), [PROMPTS[1]] * 4, GREEDY)}
    for first in (1, 5, 9):
        limits = range(first, first + 4)
        params = [dataclasses.replace(GREEDY, max_tokens=limit) for limit in limits]
        completions = generate(target(), [PROMPTS[1]] * 4, params, speculation=ssd(scale))
        for completion, limit in zip(completions, limits, strict=True):
            assert completion.token_ids == whole[:limit]
            assert completion.finish_reason == "length"
            assert_honest_counts(completion, DRAFT_LEN)
            counts = completion.speculation
            seen = counts.target_steps, counts.total.num_draft_tokens
            if scale == GOOD:
                assert seen == steps_needed(limit, DRAFT_LEN)
            if limit == 1:
                assert seen == (1, 0)
                assert counts.lookups.lookups == (0, 0)


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
def test_a_text_fills_the_context_exactly(fallback):
    """With as many slots as the context and a draft have tokens."""
    prompts = [prompt_ids(CONTEXT - left) for left in (1, 2, 5, 18)]
    params = dataclasses.replace(GREEDY, max_tokens=None)
    plain = generate(target(), prompts, params)
    for scale in QUALITIES:
        options = ssd(scale, fallback=fallback)
        completions = generate(target(), prompts, params, speculation=options)
        assert_same_outputs(completions, plain)
        assert [len(c.token_ids) for c in completions] == [1, 2, 5, 18]
        for completion in completions:
            assert completion.finish_reason == "length"
            assert_honest_counts(completion, DRAFT_LEN)


@pytest.mark.parametrize("scale", QUALITIES)
def test_stop_strings_cut_where_plain_decoding_cuts(scale):
    text = generate(target(), [PROMPTS[1]] * 4, HOT)[0].text
    for length in (1, 3):
        stops = [text[start : start + length] for start in (0, 3, 7, 11)]
        params = [
            dataclasses.replace(HOT[0], stop=(stop, "not in the text"), max_tokens=19)
            for stop in stops
        ]
        plain = generate(target(), [PROMPTS[1]] * 4, params)
        assert {completion.finish_reason for completion in plain} == {"stop"}
        completions = generate(target(), [PROMPTS[1]] * 4, params, speculation=ssd(scale))
        assert_same_outputs(completions, plain)


@pytest.mark.parametrize("stop", [(), ("e", "T", "é")])
def test_pieces_of_a_stream_add_up_to_what_generate_gives(stop):
    params = [dataclasses.replace(one, stop=stop) for one in LONG]
    texts, ids, done = [""] * 4, [()] * 4, [None] * 4
    for delta in stream(target(), PROMPTS, params, speculation=ssd()):
        assert done[delta.row] is None
        texts[delta.row] += delta.text
        ids[delta.row] += delta.token_ids
        done[delta.row] = delta.completion
    whole = generate(target(), PROMPTS, params, speculation=ssd())
    assert_same_outputs(done, whole, exactly=True)
    assert_same_outputs(done, generate(target(), PROMPTS, params))
    assert texts == [completion.text for completion in whole]
    assert ids == [completion.token_ids for completion in whole]
    for one, other in zip(done, whole, strict=True):
        if one.finish_reason != "stop":  # else it depends on when the host saw the string
            assert one.speculation == other.speculation


def test_every_round_is_counted_whenever_the_host_looks():
    """The last outcome too, of which the draft would hear in a round that is not played."""
    whole = generate(target(), PROMPTS, LONG, speculation=ssd())
    pieces = [d.completion for d in stream(target(), PROMPTS, LONG, speculation=ssd())]
    for completion in (*whole, *filter(None, pieces)):
        counts = completion.speculation
        assert sum(map(sum, counts.lookups.accepted)) == counts.target_steps
