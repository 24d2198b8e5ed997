"""What can be counted instead of timed, so that a loss of speed is noticed without a clock.

Compilations are counted in test_speculative_programs and test_ssd_programs, copies of caches in
test_buffers_stay. The limits are what was counted and a little more.
"""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from speculation_cases import batch_of
from tiny_models import CONFIGS, make_tiny

from ssd_jax.decoding.autoregressive import decode
from ssd_jax.decoding.ssd import prepare, verify_draft
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.method import autoregressive, speculative
from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.engine.ssd import speculative_speculative
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.generation import generate
from ssd_jax.placement import place_model
from ssd_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the limits are of the CPU client"
)

DRAFT_LEN = 3
WIDE = dataclasses.replace(
    CONFIGS["llama"], num_layers=1, hidden_size=128, intermediate_size=512, vocab_size=512
)


@functools.cache
def model():
    return make_tiny(dataclasses.replace(CONFIGS["llama"], num_layers=1)).model


def events(folder, speculation, num_tokens):
    """How often what happened while an answer of so many tokens was made, after a rehearsal."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)

    def answer():
        return generate(model(), [[1, 2, 3]], params, speculation=speculation)

    answer()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        (completion,) = answer()
    (path,) = folder.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    names = (event.name for plane in data.planes for line in plane.lines for event in line.events)
    seen = collections.Counter(names)
    dispatches = sum(n for name, n in seen.items() if re.search(r"::ExecuteHelper(OnSing|$)", name))
    puts = sum(n for name, n in seen.items() if name.startswith("DevicePut"))
    assert dispatches > 0  # the counter counts
    steps = completion.speculation.target_steps if completion.speculation else num_tokens
    return {"dispatches": dispatches, "puts": puts, "steps": steps}


def more(tmp_path, speculation):
    """What a longer answer takes more than a shorter one."""
    short = events(tmp_path / "short", speculation, 13)
    long = events(tmp_path / "long", speculation, 41)
    return {name: long[name] - short[name] for name in short}


@pytest.mark.parametrize("kind", ["plain", "draft"])
def test_a_longer_answer_takes_no_more_dispatches_or_transfers(kind, tmp_path):
    speculation = None if kind == "plain" else Speculation(draft=model(), draft_len=DRAFT_LEN)
    found = more(tmp_path, speculation)
    assert found["steps"] >= 7
    assert (found["dispatches"], found["puts"]) == (0, 0)


@pytest.mark.parametrize("placement", ["one device", "two devices"])
def test_a_round_of_ssd_takes_three_dispatches_and_moves_nothing_from_the_host(placement, tmp_path):
    draft = model() if placement == "one device" else place_model(model(), jax.devices()[1])
    found = more(tmp_path, SSD(draft=draft, draft_len=DRAFT_LEN, fan_out=2))
    assert found["steps"] >= 7
    assert (found["dispatches"], found["puts"]) == (3 * found["steps"], 0)


@pytest.mark.parametrize("kind", ["draft", "draft paced", "ngram"])
def test_a_program_that_goes_on_is_the_one_that_began(kind, compilations):
    """A state that comes out of a program must not need another one than it went into."""
    draft = None if kind == "ngram" else model()
    ngram = NgramConfig(max_draft=DRAFT_LEN) if kind == "ngram" else None
    times = RoundTimes(seconds=((1.0,) * (DRAFT_LEN + 1),)) if kind == "draft paced" else None
    speculation = Speculation(draft=draft, ngram=ngram, draft_len=DRAFT_LEN, round_times=times)
    batch = batch_of(model(), [[1, 2, 3]], SamplingParams(max_tokens=30), DRAFT_LEN)
    method = speculative(model(), speculation)
    jax.clear_caches()
    state = method.advance(batch, method.prefill(batch), 1)
    assert compilations
    compilations.clear()
    method.advance(batch, state, 1)
    assert compilations == []


def bytes_touched(program, params):
    """Bytes that a turn of the compiled program reads and writes, over those of the weights.

    XLA counts the body of each loop once.
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return program.compile().cost_analysis()["bytes accessed"] / weights


def test_a_step_of_plain_decoding_touches_each_weight_once():
    wide = make_tiny(WIDE).model
    batch = batch_of(wide, [[1, 2, 3]], SamplingParams(max_tokens=16))
    state = autoregressive(wide).prefill(batch)
    program = decode.lower(wide.config, wide.params, batch.sampling, state, np.int32(3))
    assert bytes_touched(program, wide.params) < 1.02  # the embedding is looked up, not read: 0.95


def test_rounds_of_ssd_touch_little_besides_weights():
    wide = make_tiny(WIDE).model
    ssd = SSD(draft=wide, draft_len=DRAFT_LEN, fan_out=2)
    batch = batch_of(wide, [[1, 2, 3]], SamplingParams(max_tokens=16), DRAFT_LEN)
    run = speculative_speculative(wide, ssd).prefill(batch)
    verify = verify_draft.lower(
        wide.config,
        wide.params,
        run.target_sampling,
        run.target,
        run.stats,
        jax.ShapeDtypeStruct((1, DRAFT_LEN + 2), np.int32),
        None,
        None,
        verification="coupled",
    )
    assert bytes_touched(verify, wide.params) < 1.65  # 4 tokens' activations are not nothing: 1.56
    preparing = prepare.lower(ssd.speculator, wide.params, run.draft_sampling, run.speculator)
    assert bytes_touched(preparing, wide.params) < 3.9  # the trunk and a step of 8 branches: 3.74
