import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS, prompt_ids, tiny

from ssd_jax import generation, memory
from ssd_jax.engine import method, prompts
from ssd_jax.errors import MemoryBudgetError
from ssd_jax.kv_cache import cache_bytes, init_cache
from ssd_jax.model import transpose_output
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_is_what_the_cache_takes(dtype):
    cache = init_cache(CONFIGS["qwen3"], 3, 16, dtype)
    taken = sum(buffer.nbytes for buffer in (*cache.keys, *cache.values))
    assert cache_bytes(CONFIGS["qwen3"], 3, 16, dtype) == taken


def test_a_batch_takes_at_least_its_cache_and_options():
    config = CONFIGS["llama"]
    needed = memory.batch_bytes(config, 4, 256, "float32")
    options = 4 * config.vocab_size * 9  # bias and counts of 4 bytes, prompt mask of 1
    assert needed >= cache_bytes(config, 4, 256, "float32") + options
    assert memory.batch_bytes(config, 8, 256, "float32") == 2 * needed


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
