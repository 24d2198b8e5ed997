"""Rows whose logits are not finite end with "error", by every method, and disturb nobody else.

A model is poisoned at a token: NaN is its embedding, so that whatever reads the token computes NaN
from there on. What it then emits is known from the healthy model: the same output up to the first
poisoned token.
"""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation_cases import DRAFT_LEN, assert_honest_counts, assert_same_outputs
from ssd_cases import CONFIG, FAIR, FAN_OUT, draft, target

from ssd_jax.cli.answer import print_answer, refuse_failed
from ssd_jax.drafting.drafts import cut_at_failure
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import RequestError
from ssd_jax.generation import generate, stream
from ssd_jax.json_text import to_json
from ssd_jax.models.decoder import hide_failures
from ssd_jax.sampling import first_argmax
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.types import NO_TOKEN, Draft

PROMPTS = [
    [3, 1, 4, 1, 5],
    [9, 2, 6],
    [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3],
    [7],
]
GREEDY = SamplingParams(max_tokens=20, seed=0, logprobs=3)
OPTIONS = [
    GREEDY,
    dataclasses.replace(GREEDY, temperature=1.2, seed=1),
    dataclasses.replace(GREEDY, temperature=0.8, seed=2, top_k=20, top_p=0.9),
    GREEDY,
]
ALL_GREEDY = [GREEDY] * 4
PADDING = 0  # the id that fills up prompts and drafts; it occurs in outputs as well
UNUSED = 12  # occurs nowhere
EVERYTHING = tuple(range(CONFIG.vocab_size))
NGRAM = NgramConfig(n=1, max_draft=DRAFT_LEN)


def poisoned(model, *tokens):
    embedding = model.params.embedding.at[jnp.array(tokens)].set(jnp.nan)
    return dataclasses.replace(model, params=dataclasses.replace(model.params, embedding=embedding))


def insisting(model, token):
    """A model that all but surely continues every text with one token: its logit is D, others 0."""
    ones = jax.tree.map(jnp.ones_like, model.params)
    mute = [
        dataclasses.replace(layer, output=0 * layer.output, down=0 * layer.down)
        for layer in ones.layers
    ]
    lm_head = (0 * ones.lm_head).at[:, token].set(1.0)
    params = dataclasses.replace(ones, layers=tuple(mute), lm_head=lm_head)
    return dataclasses.replace(model, params=params)


def cut(completion, *tokens):
    """What a model poisoned at these tokens makes of the healthy one's completion."""
    places = [place for place, token in enumerate(completion.token_ids[:-1]) if token in tokens]
    if not places:
        return completion
    ids = completion.token_ids[: places[0] + 1]
    return dataclasses.replace(
        completion,
        text=target().tokenizer.decode(ids),
        token_ids=ids,
        finish_reason="error",
        logprobs=completion.logprobs[: len(ids)],
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """How to speculate with a draft; `keyed` outputs are plain decoding's own, token for token."""

    speculation: object
    options: list
    keyed: bool = True


def speculate(draft, **options):
    return Speculation(draft=draft, draft_len=DRAFT_LEN, **options)


def ssd(draft, **options):
    return SSD(draft=draft, draft_len=DRAFT_LEN, fan_out=FAN_OUT, **options)


METHODS = {
    "plain": Method(lambda draft: None, OPTIONS),
    "coupled": Method(speculate, OPTIONS),
    "exact": Method(functools.partial(speculate, exact=True), OPTIONS),
    "greedy": Method(functools.partial(speculate, verification="greedy"), ALL_GREEDY),
    "rejection": Method(functools.partial(speculate, verification="rejection"), OPTIONS, False),
    "n-gram": Method(lambda draft: Speculation(ngram=NGRAM), OPTIONS),
    "combined": Method(functools.partial(speculate, ngram=NGRAM), OPTIONS),
    "combined rejection": Method(
        functools.partial(speculate, ngram=NGRAM, verification="rejection"), OPTIONS, False
    ),
    "ssd": Method(ssd, OPTIONS),
    "ssd rejection": Method(functools.partial(ssd, verification="rejection"), OPTIONS, False),
    "ssd n-gram": Method(functools.partial(ssd, fallback="ngram", ngram=NGRAM), OPTIONS),
}
QUICK = ("plain", "coupled")  # the others take minutes to compile
methods = pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)


@functools.cache
def plain(all_greedy):
    return generate(target(), PROMPTS, ALL_GREEDY if all_greedy else OPTIONS)


@methods
def test_a_row_ends_where_its_logits_fail_and_the_others_go_on(name):
    method = METHODS[name]
    speculation = method.speculation(draft(FAIR))
    healthy = generate(target(), PROMPTS, method.options, speculation=speculation)
    failed_rows = set()
    for tokens in ((11,), (31,), (PADDING,), (11, 31, PADDING)):
        model = poisoned(target(), *tokens)
        completions = generate(model, PROMPTS, method.options, speculation=speculation)
        expected = [cut(completion, *tokens) for completion in healthy]
        assert_same_outputs(completions, expected)
        whole = [row for row in range(4) if expected[row] is healthy[row]]
        failed_rows |= {row for row in range(4) if row not in whole}
        assert_same_outputs(
            [completions[row] for row in whole],
            [healthy[row] for row in whole],
            exactly="combined" not in name and name != "n-gram",  # whose widths all rows decide
        )
        for completion in completions:
            assert all(np.isfinite(entry.logprob) for entry in completion.logprobs)
            assert "NaN" not in to_json(dataclasses.asdict(completion))
            if speculation is not None:
                assert_honest_counts(completion, DRAFT_LEN)
    assert len(failed_rows) >= 2


@methods
def test_nothing_is_emitted_where_the_first_logits_fail(name):
    """NaN early in the prompt, as its last token, and a bias that forbids every token."""
    method = METHODS[name]
    nothing = dict.fromkeys(EVERYTHING, -np.inf)
    prompts = [[5, UNUSED, 7, 8, 9], [5, 6, UNUSED], [5, 6, 7], PROMPTS[3]]
    options = [
        *method.options[:2],
        dataclasses.replace(method.options[2], logit_bias=nothing),
        method.options[3],
    ]
    speculation = method.speculation(draft(FAIR))
    model = poisoned(target(), UNUSED)
    *failed, last = generate(model, prompts, options, speculation=speculation)
    for completion in failed:
        assert completion.finish_reason == "error"
        assert (completion.token_ids, completion.text, completion.logprobs) == ((), "", ())
    assert last.finish_reason == "length"
    assert last.token_ids == plain(False)[3].token_ids


@methods
def test_a_draft_that_fails_does_not_change_the_output(name):
    """It fails at everything, or now and then; it drafts what the target fails at, in vain."""
    method = METHODS[name]
    if method.speculation(draft(FAIR)) is None or method.speculation(draft(FAIR)).draft is None:
        pytest.skip("there is no draft model")
    expected = plain(method.options is ALL_GREEDY)
    drafts = [
        (target(), poisoned(draft(FAIR), *EVERYTHING)),
        (target(), poisoned(draft(FAIR), *EVERYTHING[::3])),
        (poisoned(target(), UNUSED), insisting(draft(FAIR), UNUSED)),
    ]
    for index, (model, failing) in enumerate(drafts):
        speculation = method.speculation(failing)
        completions = generate(model, PROMPTS, method.options, speculation=speculation)
        nothing_drafted = index == 0 and "combined" not in name
        rows = range(4) if method.keyed or nothing_drafted else [0, 3]
        assert_same_outputs([completions[i] for i in rows], [expected[i] for i in rows])
        for completion in completions:
            assert completion.finish_reason == "length"
            assert_honest_counts(completion, DRAFT_LEN)
            by_model = completion.speculation.drafters
            if index == 0 and "draft" in by_model:
                assert by_model["draft"].num_draft_tokens == 0


@pytest.mark.parametrize("name", ["plain", "coupled", pytest.param("ssd", marks=pytest.mark.slow)])
def test_a_stream_tells_of_the_error(name):
    method = METHODS[name]
    model = poisoned(target(), 11)
    prompts = [*PROMPTS[:3], [5, 11]]
    speculation = method.speculation(draft(FAIR))
    deltas = list(stream(model, prompts, OPTIONS, speculation=speculation))
    for row in (0, 3):
        own = [delta for delta in deltas if delta.row == row]
        completion = own[-1].completion
        assert completion.finish_reason == "error"
        assert "".join(delta.text for delta in own) == completion.text
        assert tuple(token for delta in own for token in delta.token_ids) == completion.token_ids
    assert completion.token_ids == ()


def test_the_command_line_tells_of_the_error(capsys):
    args = argparse.Namespace(json=True, stream=False, quiet=False)
    answer = print_answer(poisoned(target(), 11), None, PROMPTS[0], GREEDY, args)
    printed = capsys.readouterr()
    account = json.loads(printed.out)
    assert account["finish_reason"] == "error"
    assert account["token_ids"][-1] == 11
    assert "stopped by logits that are not finite" in printed.err
    with pytest.raises(RequestError, match=r"after \d+ tokens of output, got NaN"):
        refuse_failed(answer)


def test_one_bad_logit_is_enough():
    """Without it the law cannot be known."""
    lm_head = target().params.lm_head.at[0, 40].set(np.nan)
    model = dataclasses.replace(
        target(), params=dataclasses.replace(target().params, lm_head=lm_head)
    )
    for completion in generate(model, PROMPTS, OPTIONS):
        assert (completion.finish_reason, completion.token_ids) == ("error", ())


def test_the_first_maximum_is_none_where_it_is_not_finite():
    inf, nan = np.inf, np.nan
    rows = [[1, 3, 3], [-inf, -inf, 0], [nan, 1, 2], [1, 2, nan], [-inf] * 3, [0, inf, 1]]
    expected = [1, 2, *[NO_TOKEN] * 4]
    assert first_argmax(jnp.array(rows, jnp.float32)).tolist() == expected


def test_a_draft_ends_before_the_token_it_has_no_law_for():
    tokens = jnp.array([[4, 5, NO_TOKEN, 6], [NO_TOKEN] * 4, [1, 2, 3, NO_TOKEN], [1, 2, 3, 4]])
    whole = Draft(
        tokens=tokens.astype(jnp.int32),
        count=jnp.array([4, 3, 2, 4], jnp.int32),
        law=None,
        drafter=jnp.zeros(4, jnp.int32),
    )
    draft = cut_at_failure(whole)
    assert draft.count.tolist() == [2, 0, 2, 4]
    assert draft.tokens.tolist() == [[4, 5, 0, 6], [0] * 4, [1, 2, 3, 0], [1, 2, 3, 4]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_told_by_its_key(bad):
    key = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
    value = -key
    value[0, 1, 0, 2] = bad
    new_key, new_value = map(np.asarray, hide_failures(jnp.array(key), jnp.array(value)))
    assert np.isnan(new_key[0, 1, 0, 2])
    assert new_value[0, 1, 0, 2] == 0
    others = np.ones(key.shape, bool)
    others[0, 1, 0, 2] = False
    np.testing.assert_array_equal(new_key[others], key[others])
    np.testing.assert_array_equal(new_value[others], value[others])
