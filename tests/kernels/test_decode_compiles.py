"""The Blackwell decode kernel compiled for a B200: resources and instructions, without a GPU."""

import pytest
from pallas_kernels.proof.ahead_of_time import compile_case, missing
from pallas_kernels.proof.targets import TARGETS

pytestmark = pytest.mark.slow
CASES = {
    "decode": {"op": "decode_attention"},
    "verify, head dim 64": {"op": "verify_attention", "tokens": 5, "head_dim": 64},
    "tree of 40, two tiles": {"op": "ancestor_attention", "tokens": 40},
}


@pytest.fixture(scope="module", autouse=True)
def environment():
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES)
def test_compiles_for_b200(case):
    options = CASES[case]
    (kernel,) = compile_case("decode_cases:program", TARGETS["b200"], **options)
    assert not kernel.register_budgets_ignored
    assert kernel.spill_store_bytes + kernel.spill_load_bytes == 0
    assert kernel.shared_bytes <= 227 * 1024
    assert kernel.tensor_columns <= 512
    head_dim = options.get("head_dim", 128)
    tiles = 2 if options.get("tokens", 1) * 4 > 128 else 1
    # A thread has one row: 128 weights and one factor, in the loop with masks and the one without.
    counts = kernel.counts.by_opcode
    assert counts["MUFU.EX2"] == tiles * 2 * (128 + 1)
    # A product takes 16 of what is summed over: head dims for the scores, keys for the sums. Scores
    # come before the loop and in it; one tile has code for each of its two score buffers.
    buffers = 2 if tiles == 1 else 1
    scores, sums = head_dim // 16, 128 // 16
    assert counts["UTCHMMA"] == tiles * (scores + buffers * (scores + sums))
