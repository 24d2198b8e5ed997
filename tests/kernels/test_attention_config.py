import dataclasses
import math

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import forward_sm100
from pallas_kernels.attention_config import (
    SMEM_RESERVE,
    TMEM_COLUMNS,
    ForwardConfig,
    forward_config,
    paired,
)
from pallas_kernels.forward_roles_sm100 import ForwardKernel
from pallas_kernels.forward_schedule import Schedule
from pallas_kernels.register_budgets import register_budgets, registers_at_launch


@pytest.mark.parametrize("head_dim", forward_sm100.HEAD_DIMS)
def test_forward_config_fits_an_sm(head_dim):
    config = forward_config(head_dim)
    assert config.does_not_fit(head_dim) is None
    assert config.tmem_columns(head_dim) <= TMEM_COLUMNS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tiles", 3),
        ("chunk", 24),
        ("polynomial_chunks", 5),
        ("polynomial_degree", 2),
        ("rescale_threshold", -1.0),
        ("kv_stages", 0),
        ("programs", 0),
        ("out_stages", 3),
        ("registers", (192, 80, 56)),
        ("registers", (190, 72, 56)),
    ],
)
def test_forward_config_refuses_what_cannot_be_built_and_names_it(field, value):
    with pytest.raises(ValueError, match=field):
        ForwardConfig(**{field: value})


@pytest.mark.parametrize(("warpgroups", "registers"), [(2, 256), (3, 168), (4, 128)])
def test_registers_at_launch_are_those_of_an_sm_over_all_threads(warpgroups, registers):
    assert registers_at_launch(warpgroups) == registers


@pytest.mark.parametrize(
    "budgets",
    [(232, 152, 128), (208, 208, 96), (184, 184, 80, 72), (236, 136, 128), (240, 240, 16)],
)
def test_register_budgets_refuse_what_the_block_does_not_own_or_the_instruction_takes(budgets):
    with pytest.raises(ValueError, match="registers must be multiples of 8"):
        register_budgets(*budgets)


@pytest.mark.parametrize("budgets", [(232, 144, 128), (208, 208, 88), (184, 184, 80, 64)])
def test_register_budgets_may_use_up_what_the_block_owns(budgets):
    owned = registers_at_launch(len(budgets)) * len(budgets)
    assert sum(register_budgets(*budgets)) == owned


def test_a_pair_needs_the_memory_of_one_block_for_twice_the_stages():
    config = forward_config(128)
    assert paired(config).smem_bytes(128) == config.smem_bytes(128)
    assert paired(config).kv_stages == 2 * config.kv_stages
    with pytest.raises(ValueError, match="wait"):
        paired(ForwardConfig(overlay="wait"))


def test_forward_config_says_why_it_does_not_fit():
    assert "tensor memory" in (ForwardConfig(overlay="none").does_not_fit(128) or "")
    assert "shared memory" in (ForwardConfig(kv_stages=3).does_not_fit(128) or "")


@pytest.mark.parametrize("count", range(9))
def test_is_polynomial_holds_for_as_many_chunks_as_asked(count):
    config = ForwardConfig(chunk=16, polynomial_chunks=count)
    chosen = [config.is_polynomial(index) for index in range(config.num_chunks)]
    assert sum(chosen) == count
    assert not chosen[-1] or count == config.num_chunks


@pytest.mark.parametrize("overlay", ["in_order", "wait", "none"])
@pytest.mark.parametrize("head_dim", forward_sm100.HEAD_DIMS)
def test_budgets_are_those_of_the_buffers_that_the_kernel_allocates(head_dim, overlay):
    config = dataclasses.replace(forward_config(head_dim), overlay=overlay)
    schedule = Schedule(
        batch=1,
        num_tokens=256,
        num_slots=256,
        num_heads=1,
        num_kv_heads=1,
        head_bytes=2 * head_dim,
        tiles=config.tiles,
        blocks=config.blocks,
        block_kv=config.block_kv,
        causal=False,
        window=None,
        has_bounds=False,
    )
    call = ForwardKernel(
        config=config,
        schedule=schedule,
        head_dim=head_dim,
        dtype=jnp.dtype(jnp.bfloat16),
        scale=1.0,
        soft_cap=None,
        interpreted=True,
    )
    smem = columns = 0
    for buffer in call.scratch_types().values():
        if isinstance(buffer, plgpu.RefUnion):
            columns += max(_columns(member) for member in buffer.refs)
        elif getattr(buffer, "memory_space", None) == plgpu.TMEM:
            columns += _columns(buffer)
        elif getattr(buffer, "memory_space", None) == plgpu.SMEM:
            smem += math.prod(buffer.shape) * jnp.dtype(buffer.dtype).itemsize
    assert columns == config.tmem_columns(head_dim)
    assert 0 <= config.smem_bytes(head_dim) - smem <= SMEM_RESERVE


def _columns(buffer):
    return buffer.shape[-1] * jnp.dtype(buffer.dtype).itemsize // 4
