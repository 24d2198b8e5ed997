"""The same tokens wherever the models lie: one device, two, a mesh, two halves of a CPU."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from speculation_cases import DRAFT_LEN, PROMPTS, assert_same_outputs, with_times
from ssd_cases import FAIR, FAN_OUT, LONG, hit_rate
from tiny_models import CONFIGS, make_tiny, perturbed, tiny_tokenizer

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import ConfigError
from ssd_jax.generation import choose_method, generate
from ssd_jax.model import Model
from ssd_jax.placement import home, place_model, repeat_model, shard_model, spare_device

# Four key/value heads, and biases everywhere, so that every kind of weight is divided.
CONFIG = dataclasses.replace(CONFIGS["llama_tied"], num_layers=1, max_context=124)


@functools.cache
def whole() -> Model:
    return dataclasses.replace(make_tiny(CONFIG).model, tokenizer=tiny_tokenizer())


@functools.cache
def plain():
    return generate(whole(), PROMPTS, LONG)


def devices():
    found = jax.devices()
    assert len(found) >= 6, "the tests' settings ask for eight"
    return found


TARGETS = {
    "one device": lambda: place_model(whole(), devices()[0]),
    "another device": lambda: place_model(whole(), devices()[1]),
    "two devices": lambda: shard_model(whole(), devices()[:2]),
    "four devices": lambda: shard_model(whole(), devices()[:4]),
}


@pytest.mark.parametrize(
    "name",
    [
        "one device",
        pytest.param("another device", marks=pytest.mark.slow),
        pytest.param("two devices", marks=pytest.mark.slow),
        "four devices",
    ],
)
@pytest.mark.parametrize(
    "verification", ["coupled", pytest.param("rejection", marks=pytest.mark.slow)]
)
def test_target_and_draft_on_devices_of_their_own(name, verification):
    target = TARGETS[name]()
    draft = place_model(perturbed(whole(), FAIR), devices()[5])
    options = SSD(draft=draft, draft_len=DRAFT_LEN, fan_out=FAN_OUT, verification=verification)
    assert not home(target).device_set & home(draft).device_set
    completions = generate(target, PROMPTS, LONG, speculation=options)
    if verification == "coupled":
        assert_same_outputs(completions, plain())
        assert 0 < hit_rate(completions) < 1
    else:
        assert_same_outputs(completions[:2], plain()[:2])
        together = dataclasses.replace(options, draft=perturbed(whole(), FAIR))
        alone = generate(whole(), PROMPTS, LONG, speculation=together)
        assert [c.token_ids for c in completions] == [c.token_ids for c in alone]
        assert [c.speculation for c in completions] == [c.speculation for c in alone]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_draft_may_share_a_device_with_the_target(count):
    target = shard_model(whole(), devices()[:count])
    draft = place_model(perturbed(whole(), FAIR), devices()[0])
    options = SSD(draft=draft, draft_len=DRAFT_LEN, fan_out=FAN_OUT)
    assert_same_outputs(generate(target, PROMPTS, LONG, speculation=options), plain())


def test_several_draft_devices_divide_the_branches():
    """Seven branches over two devices: one more is added, for no outcome."""
    draft = repeat_model(perturbed(whole(), FAIR), devices()[4:6])
    ssd = SSD(draft=draft, draft_len=DRAFT_LEN, fan_out=(2, 2, 1, 1, 1))
    assert ssd.speculator.num_branches == 8
    completions = generate(whole(), PROMPTS, LONG, speculation=ssd)
    assert_same_outputs(completions, plain())
    alone = dataclasses.replace(ssd, draft=perturbed(whole(), FAIR))
    for one, other in zip(
        completions, generate(whole(), PROMPTS, LONG, speculation=alone), strict=True
    ):
        assert one.speculation.drafters == other.speculation.drafters
        assert one.speculation.lookups.hits == other.speculation.lookups.hits


def test_a_sharded_model_has_its_share_on_each_device():
    sharded = shard_model(whole(), devices()[:4])
    layer, original = sharded.params.layers[0], whole().params.layers[0]
    for name, parts in {"qkv": 4, "output": 4, "gate_up": 4, "down": 4, "mlp_norm": 1}.items():
        leaf = getattr(layer, name)
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}
        np.testing.assert_array_equal(leaf, getattr(original, name))
    np.testing.assert_array_equal(sharded.params.embedding, whole().params.embedding)
    assert home(sharded).device_set == set(devices()[:4])


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_heads_that_do_not_divide_are_refused(name):
    config = CONFIGS[name]
    expected = rf"got 4 devices for {config.num_kv_heads} heads and {config.intermediate_size}"
    with pytest.raises(ConfigError, match=expected):
        shard_model(make_tiny(config).model, devices()[:4])


def test_a_feed_forward_width_that_does_not_divide_is_refused():
    config = dataclasses.replace(CONFIG, intermediate_size=50)
    with pytest.raises(ConfigError, match="got 4 devices for 4 heads and 50"):
        shard_model(make_tiny(config).model, devices()[:4])


def test_a_spare_device_is_one_that_the_target_leaves():
    everywhere = devices()
    assert spare_device(place_model(whole(), everywhere[0])) == everywhere[-1]
    assert spare_device(place_model(whole(), everywhere[-1])) == everywhere[-2]
    half = shard_model(whole(), everywhere[4:8])
    assert spare_device(half) == everywhere[3]
    assert spare_device(shard_model(whole(), everywhere[:4])) == everywhere[-1]


SPLIT = """
import dataclasses, json
import jax
from ssd_jax.cpu_clients import can_split_cpu, draft_cpu, split_cpu
before = can_split_cpu()
target_device, draft_device = split_cpu()
from speculation_cases import GREEDY, PROMPTS
from ssd_cases import FAIR, draft, ssd, target
from ssd_jax.generation import generate
from ssd_jax.placement import place_model
model = place_model(target(), target_device)
drafter = place_model(draft(FAIR), draft_device)
options = ssd(FAIR, draft_len=2, fan_out=2)
options = dataclasses.replace(options, draft=drafter)
outputs = generate(model, PROMPTS, GREEDY, speculation=options)
print(json.dumps({
    "could": before,
    "can_again": can_split_cpu(),
    "two": target_device != draft_device and draft_cpu() == draft_device,
    "placed": model.params.embedding.devices() == {target_device}
    and drafter.params.embedding.devices() == {draft_device},
    "default": jax.numpy.zeros(1).devices() == {target_device},
    "tokens": [list(one.token_ids) for one in outputs],
}))
"""
TOO_LATE = """
import jax
jax.numpy.zeros(1)
from ssd_jax.cpu_clients import can_split_cpu, split_cpu
from ssd_jax.errors import ConfigError
assert not can_split_cpu()
try:
    split_cpu()
except ConfigError as error:
    print(error)
"""
TOO_MANY = """
import os
from ssd_jax.cpu_clients import split_cpu
from ssd_jax.errors import ConfigError
for count in (0, len(os.sched_getaffinity(0))):
    try:
        split_cpu(count)
    except ConfigError as error:
        print(error)
"""


def python(code):
    """What a fresh process prints; JAX has not run anything in it."""
    variables = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    if jax.config.jax_compilation_cache_dir:
        variables["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


can_split = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)


@can_split
@pytest.mark.slow
def test_two_halves_of_a_cpu_are_two_devices():
    from speculation_cases import GREEDY
    from ssd_cases import target

    said = json.loads(python(SPLIT))
    assert not said["can_again"]
    for what in ("could", "two", "placed", "default"):
        assert said[what], what
    expected = generate(target(), PROMPTS, GREEDY)
    assert said["tokens"] == [list(one.token_ids) for one in expected]


@can_split
def test_splitting_too_late_or_too_much_is_refused():
    assert "must come before JAX runs anything" in python(TOO_LATE)
    lines = python(TOO_MANY).splitlines()
    assert len(lines) == 2
    assert all("needs a core for each side, got" in line for line in lines)


def on_four_devices(method):
    """A target on a mesh of four devices, and how to decode with it."""
    target = shard_model(whole(), devices()[:4])
    draft = shard_model(perturbed(whole(), FAIR), devices()[:4])
    match method:
        case "plain":
            return target, None
        case "paced":
            speculation = Speculation(draft=draft, draft_len=DRAFT_LEN)
            return target, with_times(speculation, lambda drafted: 1.0 + 0.1 * drafted)
        case "made up":
            return target, Speculation(draft=draft, draft_len=DRAFT_LEN, synthetic_acceptance=0.5)
        case "n-gram":
            return target, Speculation(ngram=NgramConfig(n=1, max_draft=DRAFT_LEN))
    draft = place_model(perturbed(whole(), FAIR), devices()[5])
    return target, SSD(draft=draft, draft_len=DRAFT_LEN, fan_out=FAN_OUT)


@pytest.mark.parametrize(
    "method",
    [
        "plain",
        "paced",
        pytest.param("made up", marks=pytest.mark.slow),
        pytest.param("n-gram", marks=pytest.mark.slow),
        pytest.param("ssd", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gets_its_options_once(method):
    """A dispatch copies nothing to the devices or between them, not even a number of steps."""
    target, speculation = on_four_devices(method)
    requests = make_requests(target, PROMPTS, LONG)
    decoding, batch = choose_method(target, requests, speculation)
    state = decoding.advance(batch, decoding.prefill(batch), 2)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state = decoding.advance(batch, state, 2)
        state = decoding.stop(state, np.array([True, False, False, False]))
        state = decoding.advance(batch, state, 2)
    assert batch.sampling.temperature.sharding == home(target)


def test_a_request_to_a_mesh_copies_nothing_but_by_intent():
    target = shard_model(whole(), devices()[:4])
    with jax.transfer_guard("disallow"):
        completions = generate(target, PROMPTS, LONG)
    assert_same_outputs(completions, plain())
