"""SSD's rounds as programs: compiled once, moving nothing unasked, and clear when they fail."""

import dataclasses

import jax
import numpy as np
import pytest
from speculation_cases import GREEDY, HOT, OPTIONS, PROMPTS
from ssd_cases import BAD, FAIR, GOOD, LONG, begin, ssd, target
from tiny_models import prompt_ids

import ssd_jax.engine.ssd
from ssd_jax.decoding.finish import Finish
from ssd_jax.decoding.ssd import prepare, propose
from ssd_jax.errors import DeviceError
from ssd_jax.generation import generate, stream
from ssd_jax.sampling_params import SamplingParams


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
def test_nothing_is_compiled_for_other_options_or_lengths(fallback, compilations):
    runs = (generate, lambda *args, **kwargs: list(stream(*args, **kwargs)))
    for run in runs:
        params = dataclasses.replace(GREEDY, stop=("zzz",))
        run(target(), PROMPTS, params, speculation=ssd(fallback=fallback))
    jax.jit(lambda x: x * 5 + 2)(np.float32(1))
    assert len(compilations) >= 1  # the counter counts
    sizes = [program._cache_size() for program in (propose, prepare)]
    compilations.clear()
    others = [
        OPTIONS,
        HOT,
        [dataclasses.replace(params, stop=("a", "b"), stop_token_ids=(1, 2)) for params in OPTIONS],
        [SamplingParams(max_tokens=90, seed=0, logprobs=4), *OPTIONS[1:]],
    ]
    for first, params in zip((2, 3, 5, 9), others, strict=True):
        prompts = [prompt_ids(length) for length in (first, 17, 4, 1)]
        for scale, run in zip((GOOD, BAD), runs, strict=True):
            run(target(), prompts, params, speculation=ssd(scale, fallback=fallback))
    assert compilations == []
    assert [program._cache_size() for program in (propose, prepare)] == sizes


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
def test_rounds_move_nothing_between_host_and_device_but_by_intent(fallback):
    method, batch, run = begin(target(), ssd(FAIR, fallback=fallback), PROMPTS, LONG)
    run = method.advance(batch, run, 1)
    with jax.transfer_guard("disallow"):
        run = method.advance(batch, run, 60)
    assert run.target.finish.tolist() == [Finish.LENGTH] * 4
    tokens = np.asarray(run.target.tokens)
    for row, completion in enumerate(generate(target(), PROMPTS, LONG)):
        start = len(PROMPTS[row])
        output = tokens[row, start : start + len(completion.token_ids)]
        assert tuple(output.tolist()) == completion.token_ids


def test_finished_and_padding_rows_do_nothing_while_others_go_on():
    method, batch, run = begin(target(), ssd(FAIR), PROMPTS[:3], LONG[:3])
    run = method.advance(batch, run, 2)
    run = method.stop(run, np.array([True, False, False, False]))

    def still(run):
        own = run.target
        return jax.device_get((own.tokens, own.lengths, own.output_counts, own.finish, run.stats))

    before = still(run)
    after = still(method.advance(batch, run, 60))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one[[0, 3]], other[[0, 3]])
    assert after[3].tolist() == [Finish.STOP, Finish.LENGTH, Finish.LENGTH, Finish.STOP]
    assert np.all(after[1][1:3] > before[1][1:3])


@pytest.mark.parametrize("program", ["propose", "prepare"])
@pytest.mark.parametrize("rounds", [0, 3])
def test_a_draft_program_that_cannot_start_ends_the_request(program, rounds, monkeypatch):
    real, calls = getattr(ssd_jax.engine.ssd, program), []

    def failing(*args):
        calls.append(program)
        if len(calls) > rounds:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
        return real(*args)

    monkeypatch.setattr(ssd_jax.engine.ssd, program, failing)
    message = rf"The draft's program \({program}\) .* INTERNAL: the device is gone"
    for run in (generate, lambda *args, **kwargs: list(stream(*args, **kwargs))):
        calls.clear()
        with pytest.raises(DeviceError, match=message):
            run(target(), PROMPTS, LONG, speculation=ssd(BAD))
        assert len(calls) == rounds + 1


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_draft_program_that_fails_while_it_runs_ends_the_request(rounds, monkeypatch):
    """Nobody waits for it when it is dispatched: the failure is noticed later."""
    real, calls = ssd_jax.engine.ssd.prepare, []

    def fail(values):
        raise RuntimeError("the device is gone")

    @jax.jit
    def broken(values):
        shape = jax.ShapeDtypeStruct(values.shape, values.dtype)
        return jax.pure_callback(fail, shape, values)

    def failing(*args):
        calls.append(rounds)
        state = real(*args)
        if len(calls) > rounds:
            tokens = broken(state.prepared.tokens)
            prepared = dataclasses.replace(state.prepared, tokens=tokens)
            state = dataclasses.replace(state, prepared=prepared)
        return state

    monkeypatch.setattr(ssd_jax.engine.ssd, "prepare", failing)
    with pytest.raises(DeviceError, match=r"program of the target or the draft|draft's program"):
        generate(target(), PROMPTS, LONG, speculation=ssd(BAD))
    assert rounds < len(calls) <= rounds + 3
    monkeypatch.undo()
    completions = generate(target(), PROMPTS, LONG, speculation=ssd(BAD))  # works again
    assert [c.token_ids for c in completions] == [
        c.token_ids for c in generate(target(), PROMPTS, LONG)
    ]


def test_mistakes_of_the_program_are_not_told_as_failures_of_a_device(monkeypatch):
    def mistaken(*args):
        raise TypeError("a mistake")

    monkeypatch.setattr(ssd_jax.engine.ssd, "propose", mistaken)
    with pytest.raises(TypeError, match="a mistake"):
        generate(target(), PROMPTS, LONG, speculation=ssd(BAD))
