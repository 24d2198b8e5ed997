"""The loop as a program: compiled once, without transfers, and still where rows have ended."""

import dataclasses

import jax
import numpy as np
from speculation_cases import DRAFT_LEN, GREEDY, HOT, OPTIONS, PROMPTS, batch_of
from tiny_models import prompt_ids

from ssd_jax.decoding.finish import Finish
from ssd_jax.decoding.speculative import decode_speculative
from ssd_jax.engine.method import speculative
from ssd_jax.engine.speculation import Speculation
from ssd_jax.generation import generate, stream
from ssd_jax.sampling_params import SamplingParams


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
            speculation.drafter,
            draft.params,
            batch.sampling,
            state,
            num_rounds,
            verification="coupled",
            widths=speculation.widths,
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
        target, stats, _ = method.view(state)
        return jax.device_get(
            (target.tokens, target.lengths, target.output_counts, target.finish, stats)
        )

    before = still(state)
    after = still(method.advance(batch, state, 30))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one[[0, 3]], other[[0, 3]])
    assert after[3].tolist() == [Finish.STOP, Finish.LENGTH, Finish.LENGTH, Finish.STOP]
    assert np.all(after[1][1:3] > before[1][1:3])
