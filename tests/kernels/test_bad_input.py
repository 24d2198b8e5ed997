"""NaN, padding that holds anything, and rows that see nothing: the specification and the kernels.

See `pallas_kernels.reference` for what the specification says of them.
"""

import jax
import numpy as np
import pytest
from bad_inputs import CLEAN, PROBLEMS, judge

from pallas_kernels.proof.interpret import run_case

QUICK = [("sm_100", "ancestor_attention"), ("sm_90", "attention")]
KERNELS = [
    *(("sm_100", op) for op in PROBLEMS),
    *(("sm_90", op) for op in PROBLEMS if op != "attention_backward"),
]


@pytest.mark.parametrize("op", PROBLEMS)
def test_the_specification(op):
    problem = PROBLEMS[op]()
    assert judge(problem, jax.jit(problem.reference)()) == []


@pytest.mark.parametrize(
    ("chip", "op"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in KERNELS],
)
def test_a_kernel(chip, op):
    outcome = run_case("bad_input_cases:of_kernel", chip=chip, kernel=chip, op=op)
    assert outcome.error is None, outcome.log
    assert not outcome.races, outcome.log
    assert outcome.figures["wrong"] == []
    assert outcome.figures["relative_rms"] < 4e-3


@pytest.mark.parametrize("op", PROBLEMS)
def test_neither_losing_nor_spreading_a_nan_passes(op):
    problem = PROBLEMS[op]()
    found = problem.reference()
    assert judge(problem, jax.tree.map(lambda x: np.full_like(x, np.nan), found))
    assert judge(problem, jax.tree.map(lambda x: np.broadcast_to(x[CLEAN], x.shape), found))
