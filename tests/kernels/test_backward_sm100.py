"""The Blackwell gradients in the interpreter: values, races, and that it notices faults."""

import jax
import pytest
from backward_cases import wrong
from edges import EDGES
from faults import expected, how_refused
from slips import BACKWARD

from pallas_kernels import backward_sm100
from pallas_kernels.backward_tiles_sm100 import BackwardConfig
from pallas_kernels.proof.interpret import run_case

CASES = {
    "causal_gqa_d64": {"causal": True, "heads": 2, "head_dim": 64, "size": 3.0},
    "ragged": {
        "lengths": [257, 0, 129],
        "batch": 3,
        "tokens": 100,
        "slots": 300,
        "head_dim": 64,
        "scale": 0.1,
        "lse_gradient": True,
    },
}
SLOW_CASES = {
    "full_d128": {"tokens": 384, "slots": 128},
    "causal_three_tiles": {"causal": True, "tokens": 384, "slots": 384, "dtype": "float16"},
    "four_heads_a_kv_head": {"heads": 4, "causal": True, "head_dim": 64, "batch": 2},
    "causal_ragged_grouped": {
        "lengths": [1, 127, 129],
        "batch": 3,
        "tokens": 129,
        "slots": 129,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "causal": True,
    },
    "lengths_at_edges": {
        "lengths": EDGES,
        "batch": len(EDGES),
        "tokens": 64,
        "slots": 300,
        "head_dim": 64,
    },
    "beside_d128": {"share": False, "tokens": 384},
    "in_turns_d64": {"share": True, "head_dim": 64, "causal": True},
}


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW_CASES.items()),
    ],
)
def test_gradients_agree_with_float64_and_do_not_race(arguments):
    outcome = run_case("backward_cases:accuracy", timeout=300.0, **arguments)
    assert outcome.error is None, outcome.log
    assert not outcome.races, outcome.log
    assert wrong(outcome.figures, arguments) == [], outcome.figures


@pytest.mark.slow
def test_large_scores_cost_no_more_than_rounding_to_16_bits():
    large = {"head_dim": 64, "size": 6.0}
    least = run_case("backward_cases:rounding_errors", timeout=300.0, **large).figures
    outcome = run_case("backward_cases:accuracy", timeout=300.0, **large)
    assert not outcome.races, outcome.log
    assert least.keys() == outcome.figures.keys()
    for name, error in outcome.figures.items():
        assert error <= 1.02 * least[name]


# "barrier" takes out a whole handshake. Bulk copies arrive by themselves, so that of their barriers
# only the waits can be taken out.
FAULTS = [
    "barrier gradients_free",
    "barrier queries_free",
    "barrier scores_full",
    "barrier slopes_full",
    "barrier weights_ready",
    "barrier slopes_ready",
    "barrier key_product_done",
    "wait queries_full",
    "wait gradients_full",
    "wait keys_full",
    "commit_tmem",
    "wait_load_tmem",
    "commit_smem",
]
QUERY_FAULTS = [
    "barrier keys_free",
    "barrier values_free",
    "barrier tiles_full",
    "barrier tiles_free",
    "barrier slopes_ready",
    "barrier all_done",
    "wait keys_full",
    "wait values_full",
    "wait queries_full",
    "wait rows_full",
    "commit_tmem",
    "wait_load_tmem",
    "commit_smem",
]


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("key_value", "barrier scores_free"),
        *(pytest.param("key_value", fault, marks=pytest.mark.slow) for fault in FAULTS),
        *(pytest.param("query", fault, marks=pytest.mark.slow) for fault in QUERY_FAULTS),
    ],
)
def test_missing_synchronisation_is_detected(kernel, fault):
    outcome = run_case("backward_cases:faulty", timeout=90.0, kernel=kernel, fault=fault)
    assert outcome.detection in expected(fault), outcome.log


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if index else ())
        for index, name in enumerate(BACKWARD)
    ],
)
def test_a_slip_of_the_hand_is_refused(name):
    slip = BACKWARD[name]
    case = (CASES | SLOW_CASES)[slip.case]
    outcome = slip.run("backward_cases:accuracy", case)
    assert how_refused(outcome, wrong, case) in slip.refusals, outcome.log


def shapes(*, tokens=256, slots=256, head_dim=128, dtype="bfloat16"):
    query = jax.ShapeDtypeStruct((1, tokens, 2, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, slots, 1, head_dim), dtype)
    lse = jax.ShapeDtypeStruct((1, 2, tokens), "float32")
    return (query, key, key, None, None, query, lse, query, None)


OPTIONS = {"causal": False, "scale": 1.0, "soft_cap": None, "window": None}


def test_unsupported_names_the_reason():
    unsupported = backward_sm100.unsupported
    assert unsupported(*shapes(), **OPTIONS) is None
    assert "head dim 64 or 128" in unsupported(*shapes(head_dim=96), **OPTIONS)
    assert "float32" in unsupported(*shapes(dtype="float32"), **OPTIONS)
    assert "T = S" in unsupported(*shapes(tokens=128), **OPTIONS | {"causal": True})
    assert "window" in unsupported(*shapes(), **OPTIONS | {"window": 5})
    query, key, value, lengths, _, *rest = shapes()
    assert "start" in unsupported(query, key, value, lengths, query, *rest, **OPTIONS)


def test_tiles_take_turns_only_where_tensor_memory_is_short():
    assert BackwardConfig().shares(128)
    assert not BackwardConfig().shares(64)
    with pytest.raises(ValueError, match="at least 2"):
        BackwardConfig(query_stages=1)
