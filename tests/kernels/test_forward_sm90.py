"""The Hopper forward kernel in the interpreter: values and races."""

import jax
import pytest
from edges import EDGES
from faults import PRODUCT_WAIT, expected, how_refused
from hopper_cases import wrong
from slips import HOPPER_FORWARD

from pallas_kernels import forward_sm90
from pallas_kernels.forward_sm90 import HopperConfig
from pallas_kernels.proof.interpret import run_case

CASES = {
    "causal_gqa_d64": {
        "causal": True,
        "tokens": 256,
        "heads": 2,
        "head_dim": 64,
        "dtype": "float16",
        "size": 6.0,
    },
    "ragged": {
        "lengths": [300, 0, *EDGES, 500],
        "batch": 3 + len(EDGES),
        "tokens": 70,
        "slots": 400,
        "head_dim": 64,
        "scale": 0.1,
    },
    "starts_at_edges": {
        "causal": True,
        "start": EDGES,
        "batch": len(EDGES),
        "tokens": 128,
        "slots": 384,
        "head_dim": 64,
    },
}
SLOW_CASES = {
    "full": {"slots": 384, "size": 6.0},
    "causal_with_start": {
        "causal": True,
        "start": [70, 0],
        "lengths": [230, 100],
        "batch": 2,
        "tokens": 160,
        "slots": 256,
    },
    "causal_ragged_grouped": {
        "causal": True,
        "start": [300] * len(EDGES),
        "lengths": EDGES,
        "batch": len(EDGES),
        "heads": 4,
        "kv_heads": 2,
        "tokens": 70,
        "slots": 300,
        "head_dim": 64,
    },
    "narrow_blocks": {"block_kv": 64, "slots": 320, "size": 6.0, "heads": 2, "kv_heads": 2},
    "many_steps": {"slots": 1024, "head_dim": 64, "size": 6.0},
}


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW_CASES.items()),
    ],
)
def test_forward_agrees_with_float64_and_does_not_race(arguments):
    outcome = run_case("hopper_cases:accuracy", chip="sm_90", timeout=300.0, **arguments)
    assert outcome.error is None, outcome.log
    assert not outcome.races, outcome.log
    assert wrong(outcome.figures, arguments) == [], outcome.figures


@pytest.mark.parametrize(
    "fault",
    [
        "barrier keys_free",
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in (
                "barrier values_free",
                "wait keys_full",
                "wait values_full",
                "wait queries_full",
                "wait keys_free",
                "wait values_free",
                "commit_smem",
                "wait_smem_to_gmem",
                PRODUCT_WAIT,
            )
        ),
    ],
)
def test_missing_synchronisation_is_detected(fault):
    outcome = run_case("hopper_cases:faulty", chip="sm_90", timeout=90.0, fault=fault)
    assert outcome.detection in expected(fault), outcome.log


@pytest.mark.slow
@pytest.mark.parametrize("name", HOPPER_FORWARD)
def test_a_slip_of_the_hand_is_refused(name):
    slip = HOPPER_FORWARD[name]
    case = (CASES | SLOW_CASES)[slip.case]
    outcome = slip.run("hopper_cases:accuracy", case, chip="sm_90")
    assert how_refused(outcome, wrong, case) in slip.refusals, outcome.log


def test_unsupported_names_the_reason():
    def reason(*, head_dim=128, dtype="bfloat16", **options):
        query = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
        options = {"causal": True, "scale": 1.0, "soft_cap": None, "window": None} | options
        return forward_sm90.unsupported(query, query, query, None, None, **options)

    assert reason() is None
    assert "head dim 64 or 128" in reason(head_dim=80)
    assert "float32" in reason(dtype="float32")
    assert "soft cap" in reason(soft_cap=30.0)


def test_config_refuses_what_the_kernel_has_no_form_for():
    with pytest.raises(ValueError, match="block_kv"):
        HopperConfig(block_kv=100)
    with pytest.raises(ValueError, match="stages"):
        HopperConfig(stages=1)
