"""The decode kernels compiled for a B200 and an H200: resources and instructions, no GPU needed."""

import pytest

from pallas_kernels.proof.ahead_of_time import compile_case, interpreters, missing
from pallas_kernels.proof.targets import TARGETS

pytestmark = pytest.mark.slow
CASES = {
    "decode": {"op": "decode_attention"},
    "verify, head dim 64": {"op": "verify_attention", "tokens": 5, "head_dim": 64},
    "tree of 40, two tiles": {"op": "ancestor_attention", "tokens": 40},
    "float16, head dim 64": {"op": "decode_attention", "head_dim": 64, "dtype": "float16"},
    "float16, tree of 40": {"op": "ancestor_attention", "tokens": 40, "dtype": "float16"},
}


@pytest.fixture(scope="module", params=interpreters())
def python(request):
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def assert_registers_suffice(kernel, spilled):
    if kernel.assembler.startswith("nvJitLink"):
        return  # It ignores budgets, so kernels may spill: a GPU gets none with that JAX.
    assert not kernel.register_budgets_ignored
    assert not kernel.products_serialized
    assert kernel.spill_store_bytes + kernel.spill_load_bytes <= spilled
    assert not any(loop["LDL"] or loop["STL"] for loop in kernel.hot_loops)
    assert kernel.registers_asked <= kernel.registers * kernel.warpgroups


@pytest.mark.parametrize("case", CASES)
def test_compiles_for_b200(python, case):
    options = CASES[case]
    kernel, _ = compile_case("decode_cases:program", TARGETS["b200"], python=python, **options)
    assert kernel.name.startswith("attention_decode_sm100")
    assert_registers_suffice(kernel, spilled=0)
    assert kernel.shared_bytes <= 227 * 1024
    assert kernel.tensor_columns <= 512
    head_dim = options.get("head_dim", 128)
    tiles = 2 if options.get("tokens", 1) * 4 > 128 else 1
    # A thread has one row: 128 weights and one factor, in the loop without masks and the one with
    # masks. That has code for each of one tile's two score buffers, since it also zeroes values.
    counts = kernel.counts.by_opcode
    loops = 3 if tiles == 1 else 2
    assert counts["MUFU.EX2"] == tiles * loops * (128 + 1)
    # A product takes 16 of what is summed over: head dims for the scores, keys for the sums. Scores
    # come before the loop and in it; one tile has code for each of its two score buffers.
    buffers = 2 if tiles == 1 else 1
    # Warps vote on rescaling, in each of these loops.
    assert len(kernel.vote_branches) == tiles * loops
    assert all(branch["BAR"] == 0 for branch in kernel.vote_branches)
    scores, sums = head_dim // 16, 128 // 16
    assert counts["UTCHMMA"] == tiles * (scores + buffers * (scores + sums))


HOPPER_CASES = {
    "decode": {"op": "decode_attention"},
    "verify, head dim 64": {"op": "verify_attention", "tokens": 5, "head_dim": 64},
    "tree of 20, two tiles": {"op": "ancestor_attention", "tokens": 20},
    "float16, head dim 64": {"op": "decode_attention", "head_dim": 64, "dtype": "float16"},
    "float16, head dim 64, tree of 20": {
        "op": "ancestor_attention",
        "tokens": 20,
        "head_dim": 64,
        "dtype": "float16",
    },
}


@pytest.mark.parametrize("case", HOPPER_CASES)
def test_compiles_for_h200(python, case):
    options = HOPPER_CASES[case]
    kernel, _ = compile_case(
        "decode_cases:program", TARGETS["h200"], python=python, kernel="sm_90", **options
    )
    assert kernel.name.startswith("attention_decode_sm90")
    assert_registers_suffice(kernel, spilled=24)  # before the loops
    assert kernel.shared_bytes <= 227 * 1024
    head_dim = options.get("head_dim", 128)
    tiles = 2 if options.get("tokens", 1) * 4 > 64 else 1
    # Both loops hold the scores' product and the sums'; a product takes 16 of what is summed over.
    counts = kernel.counts.by_opcode
    products = sum(number for name, number in counts.items() if name.startswith("HGMMA"))
    assert products == tiles * 2 * (head_dim // 16 + 128 // 16)
    # A warpgroup's thread has 64 weights of each block of its 64 rows, and two rows' factors.
    assert counts["MUFU.EX2"] == tiles * 2 * (64 + 2)
