"""What is reckoned against what lies on the device and what XLA plans; limits of containers."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS, make_tiny, prompt_ids, tiny

from ssd_jax import generation, memory
from ssd_jax.containers import container_free_bytes
from ssd_jax.decoding import ssd as decoding
from ssd_jax.decoding.autoregressive import decode
from ssd_jax.decoding.prefill import prefill_chunk
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine import memory_need, method, prompts, ssd
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import MemoryBudgetError
from ssd_jax.model import transpose_output
from ssd_jax.placement import place_model, shard_model
from ssd_jax.sampling_params import SamplingParams


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_params_bytes_is_what_the_weights_take(name, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny(name).params)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory.params_bytes(CONFIGS[name], jnp.dtype(dtype)) == taken
    params = transpose_output(params)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory.params_bytes(CONFIGS[name], jnp.dtype(dtype), own_output=True) == taken


VOCAB = 1000  # so that laws weigh as much as they do in real models
WIDE = dataclasses.replace(
    CONFIGS["llama"], vocab_size=VOCAB, num_layers=1, max_context=100, intermediate_size=16
)
PARAMS = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=1)
ROWS = 4


@pytest.fixture(scope="module")
def wide():
    return make_tiny(WIDE).model


def methods(model):
    """Every kind of speculation, by name."""
    ngram = NgramConfig(kind="mod", table_size=1 << 12)
    return {
        "plain": None,
        "ngram simple": Speculation(ngram=NgramConfig(kind="simple")),
        "ngram map": Speculation(ngram=NgramConfig(kind="map")),
        "ngram mod": Speculation(ngram=ngram),
        "draft": Speculation(draft=model),
        "draft rejection": Speculation(draft=model, verification="rejection"),
        "combined": Speculation(draft=model, ngram=ngram, verification="rejection"),
        "ssd": SSD(draft=model),
        "ssd rejection": SSD(draft=model, verification="rejection", fan_out=2),
        "ssd ngram": SSD(draft=model, fallback="ngram", ngram=ngram),
    }


NAMES = (
    *("plain", "ngram simple", "ngram map", "ngram mod", "draft", "draft rejection", "combined"),
    *("ssd", "ssd rejection", "ssd ngram"),
)


def reckoned(model, batch, speculation):
    shape = memory_need.BatchShape(
        num_rows=len(batch.lengths),
        num_slots=batch.tokens.shape[1],
        num_top_logprobs=batch.num_top_logprobs,
    )
    (need,) = memory_need.batch_needs(model, shape, speculation).values()
    return need


def live_bytes():
    """Of all buffers; arrays may share one."""
    gc.collect()
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logprobs", [None, 5])
def test_what_is_held_is_what_lies_on_the_device(wide, name, logprobs):
    speculation = methods(wide)[name]
    params = dataclasses.replace(PARAMS, logprobs=logprobs)
    requests = make_requests(wide, [prompt_ids(9)] * ROWS, params)
    before = live_bytes()
    chosen, batch = generation.choose_method(wide, requests, speculation)
    state = chosen.prefill(batch)
    taken = live_bytes() - before
    need = reckoned(wide, batch, speculation)
    held = sum(need.held.values())
    assert taken <= 1.01 * held + 5000  # lengths, seeds and the like
    assert held <= 1.3 * taken
    assert state is not None


def planned(lowered):
    """Bytes that XLA plans beside a program's arguments."""
    plan = lowered.compile().memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def assert_close(need, plan):
    assert plan <= 1.05 * need
    assert need <= 2.5 * plan


@pytest.mark.slow
def test_what_a_round_of_ssd_makes_is_what_xla_plans(wide):
    speculation = methods(wide)["ssd rejection"]
    requests = make_requests(wide, [prompt_ids(9)] * ROWS, PARAMS)
    batch = generation.choose_method(wide, requests, speculation)[1]
    programs = ssd.open_programs(wide, speculation)
    run = ssd.begin(programs, batch)
    draft = wide.params, run.draft_sampling, run.speculator
    prepare = planned(decoding.prepare.lower(programs.speculator, *draft))
    _, message, law = jax.eval_shape(
        lambda *rest: decoding.propose(programs.speculator, *rest), *draft, run.outcome
    )
    target = wide.params, run.target_sampling, run.target, run.stats, message, law
    verify = planned(
        decoding.verify_draft.lower(WIDE, *target, verification=speculation.verification)
    )
    assert_close(reckoned(wide, batch, speculation).decoding, prepare + verify)


def test_what_plain_steps_and_prompts_make_is_what_xla_plans():
    config = dataclasses.replace(WIDE, num_layers=2)  # a prompt's last layer is not computed
    model = make_tiny(config).model
    params = dataclasses.replace(PARAMS, max_tokens=9)
    requests = make_requests(model, [prompt_ids(60)] * ROWS, params)
    chosen, batch = generation.choose_method(model, requests, None)
    state, need = chosen.prefill(batch), reckoned(model, batch, None)
    step = decode.lower(config, model.params, batch.sampling, state, np.int32(3))
    assert_close(need.decoding, planned(step))
    tokens = np.zeros(batch.tokens.shape, np.int32)
    chunk = prefill_chunk.lower(config, model.params, tokens, state.cache, np.int32(0))
    assert_close(need.reading, planned(chunk))


def test_laws_of_prepared_drafts_count(wide):
    shape = memory_need.BatchShape(num_rows=ROWS, num_slots=128, num_top_logprobs=None)
    speculation = methods(wide)["ssd rejection"]
    (need,) = memory_need.batch_needs(wide, shape, speculation).values()
    branches, draft_len = speculation.speculator.num_branches, speculation.draft_len
    assert need.held[memory_need.LAWS] >= 4 * ROWS * VOCAB * draft_len * (branches + 1)


def test_a_draft_on_another_device_is_reckoned_there(wide):
    draft = place_model(wide, jax.devices()[3])
    shape = memory_need.BatchShape(num_rows=ROWS, num_slots=128, num_top_logprobs=None)
    speculation = SSD(draft=draft, verification="rejection")
    needs = memory_need.batch_needs(wide, shape, speculation)
    assert set(needs) == {jax.devices()[0], jax.devices()[3]}
    here, there = needs[jax.devices()[0]], needs[jax.devices()[3]]
    assert there.held[memory_need.LAWS] > 10 * here.held[memory_need.LAWS]


def test_the_device_that_is_asked_is_the_one_that_is_used(wide, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "available_bytes", lambda device: asked.append(device) or 1 << 50)
    model = place_model(wide, jax.devices()[5])
    generation.choose_method(model, make_requests(model, [[1, 2]], PARAMS), None)
    assert asked == [jax.devices()[5]]


def test_a_spread_model_holds_its_share_of_the_cache():
    config = dataclasses.replace(CONFIGS["llama"], num_kv_heads=4)
    whole = make_tiny(config).model
    shape = memory_need.BatchShape(num_rows=2, num_slots=128, num_top_logprobs=None)
    spread = shard_model(whole, jax.devices()[:4])
    needs = memory_need.batch_needs(spread, shape, None)
    (alone,) = memory_need.batch_needs(whole, shape, None).values()
    assert len(needs) == 4
    for need in needs.values():
        assert abs(4 * need.held[memory_need.CACHE] - alone.held[memory_need.CACHE]) < 100


def test_a_refusal_says_what_the_memory_is_for(wide, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    requests = make_requests(wide, [prompt_ids(9)] * ROWS, PARAMS)
    with pytest.raises(MemoryBudgetError) as caught:
        generation.choose_method(wide, requests, methods(wide)["ssd rejection"])
    for words in ("KiB for drafts", "a round of decoding", "1.0 MiB", "lower fan_out"):
        assert words in str(caught.value)


V2 = {
    "proc/self/cgroup": "0::/system/job",
    "sys/fs/cgroup/system/job/memory.max": "1000",
    "sys/fs/cgroup/system/job/memory.current": "700",
    "sys/fs/cgroup/system/memory.max": "max",
}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/7\n0::/",
    "sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes": "1000",
    "sys/fs/cgroup/memory/docker/7/memory.usage_in_bytes": "900",
}
INSIDE = {
    "proc/self/cgroup": "4:memory:/docker/7",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1200",
}
UNLIMITED = str((1 << 63) - 4096)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/self/cgroup": "nonsense\n:::\n"}, None),
        (V2, 300),
        (V2 | {"sys/fs/cgroup/system/job/memory.max": "max\n"}, None),
        (V2 | {"sys/fs/cgroup/system/job/memory.stat": "file 9\ninactive_file 200\n"}, 500),
        (
            V2
            | {
                "sys/fs/cgroup/system/memory.max": "2000",
                "sys/fs/cgroup/system/memory.current": "1990",
            },
            10,
        ),
        (V2 | {"proc/self/cgroup": "0::/../elsewhere"}, None),
        (
            {
                "proc/self/cgroup": "0::/host/path",
                "sys/fs/cgroup/memory.max": "50",
                "sys/fs/cgroup/memory.current": "20",
            },
            30,
        ),
        (V1, 100),
        (V1 | {"sys/fs/cgroup/memory/docker/7/memory.stat": "total_inactive_file 60"}, 160),
        (V1 | {"sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes": UNLIMITED}, None),
        (INSIDE, 0),
    ],
)
def test_what_a_container_leaves(tmp_path, files, free):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert container_free_bytes(tmp_path) == free


def test_the_container_counts_on_a_cpu(monkeypatch):
    monkeypatch.setattr(memory, "container_free_bytes", lambda: 12345)
    assert memory.available_bytes(jax.devices("cpu")[0]) == 12345


def test_what_fits_is_let_through_to_the_byte(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    memory.require_memory("This", 1000, jax.devices()[0], "stop.")
    with pytest.raises(MemoryBudgetError):
        memory.require_memory("This", 1001, jax.devices()[0], "stop.")


def test_a_refusal_names_both_figures_and_the_way_out(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 << 20)
    with pytest.raises(MemoryBudgetError) as caught:
        memory.require_memory("A batch", 5 << 30, jax.devices()[0], "send less.")
    for words in ("A batch", "5.0 GiB", "3.0 MiB", "send less."):
        assert words in str(caught.value)


def test_a_batch_that_cannot_fit_allocates_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000)
    for module, program in (
        (prompts, "initial_state"),
        (prompts, "prefill_chunk"),
        (method, "decode"),
    ):
        monkeypatch.setattr(module, program, lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(MemoryBudgetError, match=r"batch of 4 rows with 128 tokens"):
        generation.generate(tiny("llama").model, [prompt_ids(5)] * 3, SamplingParams(max_tokens=4))


def test_a_huge_context_is_refused_for_real():
    config = dataclasses.replace(CONFIGS["llama"], max_context=(1 << 31) - 1)
    model = dataclasses.replace(tiny("llama").model, config=config)
    with pytest.raises(MemoryBudgetError, match=r"GiB.*GiB"):
        generation.generate(model, [[1, 2]], SamplingParams())


def test_available_bytes_of_this_machine_is_plausible():
    assert 1 << 20 < memory.available_bytes(jax.devices("cpu")[0]) < 1 << 50


@given(st.integers(0, 1 << 50))
def test_format_bytes_is_within_a_rounding_step(number):
    value, unit = memory.format_bytes(number).split()
    size = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    assert abs(float(value) * size - number) <= 0.05001 * size
    assert float(value) >= 1 or unit == "bytes"
