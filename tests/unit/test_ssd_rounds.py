"""What the draft's device holds after every round, against the model's whole texts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speculation_cases import OPTIONS, PROMPTS, assert_equal_caches
from ssd_cases import BAD, CONFIG, FAIR, FAN_OUT, GOOD, naive_draft, rounds, ssd, target
from tiny_models import prompt_ids, reference_law, reference_penalties

from ssd_jax.decoding.finish import Finish
from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.engine.prompts import read_prompts
from ssd_jax.model import Model
from ssd_jax.sampling import Purpose, gumbel_noise
from ssd_jax.sampling_params import SamplingParams

TOLERANCE = 1e-3  # of float32 sums, in a score
VOCAB = CONFIG.vocab_size


def ids_only(model: Model) -> Model:
    """The model without a tokenizer: all ids are words then, as the reference takes them."""
    return dataclasses.replace(model, tokenizer=None)


def run(scale, **changes):
    options = ssd(scale, **changes)
    options = dataclasses.replace(options, draft=ids_only(options.draft))
    params = [dataclasses.replace(one, max_tokens=20 + row) for row, one in enumerate(OPTIONS)]
    return options, params, rounds(ids_only(target()), options, PROMPTS, params)


def noise_of(seed, purpose):
    """The noise at every position, [128 V]."""
    words = jnp.asarray(np.tile(np.array([[seed >> 32, seed & 0xFFFFFFFF]], np.uint32), (128, 1)))
    positions = jnp.arange(128, dtype=jnp.int32)
    return np.asarray(gumbel_noise(words, positions, purpose, VOCAB), np.float64)


def favoured(law, guesses, weight):
    """Definition 14, in float64."""
    top = np.argsort(-law, kind="stable")[: guesses + 1]
    scaled = np.exp(law)
    scaled[top] *= weight
    with np.errstate(divide="ignore"):
        return np.log(scaled / scaled.sum()) if scaled.sum() > 0 else law


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_prepared_drafts_are_what_the_draft_model_says_after_each_outcome(verification):
    """Roots, tokens and laws of every branch; rows are greedy, sampled, penalised and truncated."""
    rejects = verification == "rejection"
    weight = 0.5 if rejects else 1.0
    _, params, seen = run(FAIR, verification=verification, miss_weight=weight)
    naive = naive_draft(FAIR)
    purpose = Purpose.DRAFT if rejects else Purpose.TOKEN
    drawn = [noise_of(p.seed, purpose) for p in params]
    chosen = [noise_of(p.seed, Purpose.TOKEN) for p in params]
    checked = set()
    for state in (s.speculator for s in seen[1:4]):
        text, prepared, draft = state.text, state.prepared, state.draft
        for row in np.flatnonzero(text.finish == Finish.RUNNING):
            length, prompt = text.lengths[row], PROMPTS[row]
            context = [*text.tokens[row, :length].tolist(), *draft.tokens[row].tolist()]
            own, counts = params[row], FAN_OUT.after_miss
            if state.was_hit[row]:
                counts = FAN_OUT.after_hit
            logits = naive.logits(context)[length - 1 :]
            place = 0
            for j, guesses in enumerate(counts[: draft.count[row] + 1]):
                output = context[len(prompt) : length + j]
                if own.temperature == 0:
                    scores = reference_penalties(logits[j], own, prompt, output)
                else:
                    scores = reference_law(logits[j], own, prompt, output)
                    scores = scores + chosen[row][length + j]
                if j < draft.count[row]:
                    scores[draft.tokens[row, j]] = -np.inf
                roots = prepared.bonus_token[row, place : place + guesses]
                assert prepared.num_accepted[row, place : place + guesses].tolist() == [j] * guesses
                others = np.delete(scores, roots)
                assert len(set(roots.tolist())) == guesses
                assert np.all(scores[roots] >= others.max() - TOLERANCE)
                for branch in range(place, place + guesses):
                    start = length + j + 1
                    grown = prepared.tokens[row, branch].tolist()
                    whole = [*context[: length + j], int(prepared.bonus_token[row, branch]), *grown]
                    after = naive.logits(whole)
                    for i, token in enumerate(grown):
                        law = reference_law(
                            after[start - 1 + i], own, prompt, whole[len(prompt) : start + i]
                        )
                        if rejects:
                            if own.temperature > 0:
                                law = favoured(law, FAN_OUT.after_hit[i], weight)
                            got = np.exp(np.float64(prepared.law[row, branch, i]))
                            np.testing.assert_allclose(got, np.exp(law), atol=1e-4)
                        scores_i = law + (own.temperature > 0) * drawn[row][start + i]
                        assert scores_i[token] >= scores_i.max() - TOLERANCE
                    checked.add((int(row), j, bool(state.was_hit[row])))
                place += guesses
    assert {row for row, _, _ in checked} == set(range(4))
    assert {j for _, j, _ in checked} == set(range(5))
    assert {hit for _, _, hit in checked} == {False, True}


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
@pytest.mark.parametrize("scale", [GOOD, FAIR, BAD])
def test_the_drafts_text_is_the_targets_of_a_round_ago(scale, fallback):
    _, _, seen = run(scale, fallback=fallback)
    assert seen[-1].speculator.text.finish.tolist() == [Finish.LENGTH] * 4
    gains = set()
    for before, after in itertools.pairwise(seen):
        theirs, ours = before.target, after.speculator.text
        gains |= set((after.target.lengths - theirs.lengths).tolist())
        np.testing.assert_array_equal(ours.lengths, theirs.lengths)
        np.testing.assert_array_equal(ours.finish, theirs.finish)
        np.testing.assert_array_equal(ours.output_counts, theirs.output_counts)
        for row, length in enumerate(theirs.lengths):
            np.testing.assert_array_equal(ours.tokens[row, :length], theirs.tokens[row, :length])
    assert len(gains) > 1


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
@pytest.mark.parametrize("scale", [GOOD, FAIR, BAD])
def test_both_caches_are_those_of_a_fresh_prefill(scale, fallback):
    """Of the text, and in the draft's cache of the draft that is being verified as well."""
    options, _, seen = run(scale, fallback=fallback)
    model = ids_only(target())
    for before, after in list(itertools.pairwise(seen))[:5]:
        text, draft = after.speculator.text, after.speculator.draft
        drafted = [
            [*tokens[:length].tolist(), *own.tolist(), 0]
            for tokens, length, own in zip(text.tokens, text.lengths, draft.tokens, strict=True)
        ]
        fresh = fresh_cache(options.draft, drafted)
        assert_equal_caches(text.cache, fresh, text.lengths + options.draft_len)
        state = before.target
        own = [t[:n].tolist() for t, n in zip(state.tokens, state.lengths, strict=True)]
        np.testing.assert_array_equal(state.cache.lengths, state.lengths - 1)
        assert_equal_caches(state.cache, fresh_cache(model, own), state.lengths - 1)


def fresh_cache(model, texts):
    """What a prefill of all tokens but each text's last one gives."""
    params = SamplingParams(max_tokens=1, seed=0)
    batch = make_batch(model, make_requests(model, texts, params))
    return jax.device_get(read_prompts(model, batch).cache)


def test_nothing_is_prepared_before_the_first_round():
    _, _, seen = run(FAIR)
    first = seen[0].speculator
    assert np.all(first.prepared.num_accepted < 0)
    assert not first.was_hit.any()
    assert not seen[1].speculator.stats.found.any()
    assert prompt_ids(1) == PROMPTS[0]  # a prompt of one token has no cache at all before it
