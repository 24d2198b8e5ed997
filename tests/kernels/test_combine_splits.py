"""The kernel that merges splits: values in the interpreter, and compiled ahead of time."""

import pytest

from pallas_kernels.proof.ahead_of_time import compile_case, missing
from pallas_kernels.proof.interpret import run_case
from pallas_kernels.proof.targets import TARGETS


@pytest.mark.parametrize(
    ("head_dim", "number"), [(128, [9, 0, 12]), pytest.param(64, [3, 1], marks=pytest.mark.slow)]
)
def test_it_merges_the_splits_that_exist(head_dim, number):
    """All others are NaN; a row's result is the same alone and in a cache of fewer slots."""
    outcome = run_case("combine_cases:against_xla", chip="sm_90", number=number, head_dim=head_dim)
    assert outcome.error is None, outcome.log
    assert not outcome.races
    assert outcome.figures["out"] < 1e-5
    assert outcome.figures["lse"] < 1e-5
    assert outcome.figures["blind_right"]
    assert outcome.figures["same_alone"]


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["h200", "b200"])
def test_compiles(target, head_dim):
    """Its loop loads eight splits at once, and nothing else reads them."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    (kernel,) = compile_case("combine_cases:program", TARGETS[target], head_dim=head_dim)
    assert kernel.name.startswith("attention_combine_splits")
    assert kernel.spill_store_bytes + kernel.spill_load_bytes == 0
    loads = 1 + 8 + 8 * 128 // head_dim  # the number of splits, the parts, the LSEs of the rows
    assert kernel.counts.by_opcode["LDG.E"] == loads
