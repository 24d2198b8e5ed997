"""Loops leave caches where they are: no compiled program copies an array of a cache's shape."""

import re

import jax
import numpy as np
import pytest
from speculation_cases import DRAFT_LEN, GREEDY, batch_of
from tiny_models import prompt_ids, tiny

from ssd_jax.decoding.autoregressive import decode
from ssd_jax.decoding.speculative import decode_speculative
from ssd_jax.decoding.ssd import prepare, propose
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.method import autoregressive, speculative
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.engine.ssd import speculative_speculative
from ssd_jax.engine.ssd_options import SSD

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other backends schedule copies of their own"
)


def copies_of(shape, compiled):
    """Copies of arrays of this shape in a program's loops; at its entry they would be moved in."""
    text = compiled.as_text()
    dims = ",".join(map(str, shape))
    loops = text[: text.index("\nENTRY ")]
    return re.findall(rf"= f32\[{dims}\]\S* copy\(.*", loops)


@pytest.fixture(params=[1, 4], ids=["one row", "four rows"])
def batch(request):
    prompts = [prompt_ids(5)] * request.param
    return batch_of(tiny("llama").model, prompts, GREEDY)


def test_the_check_sees_copies():
    """A loop that keeps a buffer from before its update has to copy it."""
    shape = (4, 128)

    @jax.jit
    def keeping_the_old(buffer, count):
        def turn(step, buffers):
            return buffers[0].at[0, step].set(1.0), buffers[0]

        return jax.lax.fori_loop(0, count, turn, (buffer, buffer))

    compiled = keeping_the_old.lower(np.zeros(shape, np.float32), np.int32(3)).compile()
    assert copies_of(shape, compiled)


def test_plain_decoding(batch):
    model = tiny("llama").model
    state = autoregressive(model).prefill(batch)
    program = decode.lower(model.config, model.params, batch.sampling, state, np.int32(3))
    assert copies_of(state.cache.keys[0].shape, program.compile()) == []


@pytest.mark.parametrize("kind", ["draft", "draft paced", "ngram", "combined"])
def test_speculation(batch, kind):
    model = tiny("llama").model
    draft = None if kind == "ngram" else model
    ngram = NgramConfig(max_draft=DRAFT_LEN) if kind in ("ngram", "combined") else None
    times = RoundTimes(seconds=((1.0,) * (DRAFT_LEN + 1),)) if kind == "draft paced" else None
    speculation = Speculation(draft=draft, ngram=ngram, draft_len=DRAFT_LEN, round_times=times)
    state = speculative(model, speculation).prefill(batch)
    program = decode_speculative.lower(
        model.config,
        model.params,
        speculation.drafter,
        None if draft is None else draft.params,
        batch.sampling,
        state,
        np.int32(3),
        None if times is None else np.array(times.seconds, np.float32),
        verification="coupled",
        widths=speculation.widths,
    )
    assert copies_of(state.target.cache.keys[0].shape, program.compile()) == []


@pytest.mark.parametrize("fallback", ["neural", "ngram"])
def test_speculative_speculation(batch, fallback):
    model = tiny("llama").model
    ssd = SSD(draft=model, draft_len=DRAFT_LEN, fallback=fallback)
    run = speculative_speculative(model, ssd).prefill(batch)
    state, sampling = run.speculator, run.draft_sampling
    shape = state.text.cache.keys[0].shape
    program = propose.lower(ssd.speculator, model.params, sampling, state, run.outcome)
    assert copies_of(shape, program.compile()) == []
    program = prepare.lower(ssd.speculator, model.params, sampling, state)
    assert copies_of(shape, program.compile()) == []
