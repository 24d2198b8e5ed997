"""Statistics as far as the text goes, against a count token by token."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_cases import DRAFT_LEN, GREEDY, PROMPTS
from ssd_cases import FAIR, GOOD, draft, ssd, target

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.counts import count_speculation
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate, stream
from ssd_jax.types import SpeculationStats

BOTH = Speculation(draft=draft(FAIR), ngram=NgramConfig(max_draft=DRAFT_LEN), draft_len=DRAFT_LEN)
ROUND = st.integers(0, DRAFT_LEN).flatmap(
    lambda drafted: st.tuples(st.integers(0, 1), st.just(drafted), st.integers(0, drafted))
)


@settings(deadline=None)
@given(rounds=st.lists(ROUND, min_size=1, max_size=6), begin=st.integers(0, 3), data=st.data())
def test_counts_are_those_of_a_text_read_token_by_token(rounds, begin, data):
    """Each token knows its round and whether it was drafted; those past the end are not there."""
    tokens = [
        (index, place < accepted)
        for index, (_, _, accepted) in enumerate(rounds)
        for place in range(accepted + 1)
    ]
    log = np.zeros((1, begin + len(tokens) + 2, 3), np.int8)
    position = begin
    for drafter, drafted, accepted in rounds:
        log[0, position] = 1 + drafter, drafted, accepted
        position += accepted + 1
    end = data.draw(st.integers(1, len(tokens)))
    seen = tokens[:end]
    counts = count_speculation(
        SpeculationStats(rounds=log), None, 0, slice(begin, begin + end), BOTH
    )
    assert counts.target_steps == len({index for index, _ in seen})
    for number, own in enumerate(counts.drafters.values()):
        mine = {i for i, _ in seen if rounds[i][0] == number and rounds[i][1] > 0}
        sizes = {i: sum(index == i for index, _ in seen) for i in mine}
        whole = {i for i in mine if sizes[i] == rounds[i][2] + 1}
        accepted = [sum(stood for index, stood in seen if index == i) for i in mine]
        assert own.num_drafts == len(mine)
        assert own.num_accepted_tokens == sum(accepted)
        assert own.num_emitted_tokens == sum(sizes.values())
        assert own.num_draft_tokens == sum(rounds[i][1] if i in whole else sizes[i] for i in mine)
        assert own.num_accepted_tokens_per_pos == tuple(
            sum(length > place for length in accepted) for place in range(DRAFT_LEN)
        )
        assert own.mean_acceptance_length == (sum(sizes.values()) / len(mine) if mine else 1.0)


METHODS = {
    "draft": Speculation(draft=draft(GOOD), draft_len=DRAFT_LEN),
    "combined": BOTH,
    "ssd": ssd(FAIR),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ending", ["stop", "eos"])
def test_nothing_counts_past_the_end(method, ending):
    """The same text ended by its length at the same token has rounds that end there too."""
    speculation = METHODS[method]
    params = [dataclasses.replace(GREEDY, max_tokens=40)] * 4
    plain = generate(target(), PROMPTS, params)
    texts = [one.text for one in plain]
    if ending == "stop":
        cut = [dataclasses.replace(GREEDY, max_tokens=40, stop=text[9:12]) for text in texts]
    else:
        cut = [
            dataclasses.replace(GREEDY, max_tokens=40, stop_token_ids=one.token_ids[13:14])
            for one in plain
        ]
    completions = generate(target(), PROMPTS, cut, speculation=speculation)
    assert {one.finish_reason for one in completions} == {ending}
    for one in completions:
        counts, emitted = one.speculation, len(one.token_ids)
        total = counts.total
        assert 1 <= counts.target_steps <= emitted < 40
        assert total.num_accepted_tokens <= total.num_draft_tokens
        assert total.num_emitted_tokens + counts.target_steps - total.num_drafts == emitted
        assert total.num_accepted_tokens + counts.target_steps - emitted in (0, 1)
        assert total.mean_acceptance_length <= emitted / total.num_drafts
        if counts.lookups is not None:
            assert sum(counts.lookups.lookups) == counts.target_steps - 1
            assert sum(map(sum, counts.lookups.found_at)) == sum(counts.lookups.hits)
    deltas = stream(target(), PROMPTS, cut, speculation=speculation)
    streamed = {delta.row: delta.completion for delta in deltas if delta.completion is not None}
    assert [streamed[row] for row in range(4)] == completions
