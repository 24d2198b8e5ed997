"""The Blackwell forward kernel against float64, with race detection, and with faults put in.

Inputs are loud (scores spread by 6), so that maxima grow by more than the rescaling threshold.
Where a key too many or too few must show they are quiet, so that every key weighs something.
"""

import jax
import jax.numpy as jnp
import pytest
from edges import EDGES
from faults import expected, how_refused
from forward_cases import wrong
from slips import FORWARD

from pallas_kernels import forward_sm100
from pallas_kernels.attention_config import ForwardConfig
from pallas_kernels.proof.interpret import run_case

CASES = {
    "several items a block, overlaid weights": {
        "tokens": 512,
        "slots": 384,
        "head_dim": 128,
        "overlay": "wait",
        "heads": 2,
    },
    "causal, grouped heads, ragged and poisoned": {
        "batch": 2,
        "tokens": 200,
        "slots": 300,
        "heads": 4,
        "kv_heads": 2,
        "causal": True,
        "start": [100, 37],
        "lengths": [300, 237],
        "poison": 1e4,
        "kv_stages": 2,
    },
    "float16, window, soft cap": {
        "tokens": 130,
        "slots": 520,
        "start": [380],
        "causal": True,
        "window": 150,
        "soft_cap": 20.0,
        "dtype": "float16",
    },
    "rows that see nothing, lengths at the edges of blocks": {
        "batch": 1 + len(EDGES),
        "tokens": 130,
        "slots": 300,
        "lengths": [0, *EDGES],
        "loudness": 1.0,
        "scale": 0.3,
        "poison": 1e4,
        "programs": 1,
    },
    "starts at the edges of blocks": {
        "batch": len(EDGES),
        "tokens": 128,
        "slots": 384,
        "causal": True,
        "start": EDGES,
        "loudness": 1.0,
    },
    "one block an item": {"slots": 128, "heads": 4, "programs": 1},
}
SLOW_CASES = {
    "head dim 192": {"head_dim": 192, "overlay": "wait", "causal": True},
    "head dim 128, window, soft cap": {
        "head_dim": 128,
        "overlay": "wait",
        "tokens": 300,
        "slots": 300,
        "causal": True,
        "window": 150,
        "soft_cap": 20.0,
    },
    "head dim 256": {"head_dim": 256, "tokens": 200, "causal": True},
    "head dim 128, weights beside": {
        "head_dim": 128,
        "overlay": "none",
        "tokens": 512,
        "slots": 512,
        "causal": True,
    },
    "no polynomial, rescaled always": {"polynomial_chunks": 0, "rescale_threshold": 0.0},
    "polynomial only": {"polynomial_chunks": 4, "polynomial_degree": 4},
    "small chunks": {"chunk": 16, "polynomial_chunks": 3},
    "one stage of keys": {"kv_stages": 1, "out_stages": 1, "slots": 512},
    "one tile": {"tiles": 1, "tokens": 300, "programs": 3},
    "window without causality": {"tokens": 400, "slots": 400, "window": 100},
    "windows at the edges, not causal": {
        "batch": len(EDGES),
        "tokens": 130,
        "slots": 384,
        "start": EDGES,
        "window": 126,
        "loudness": 1.0,
    },
    "windows at the edges, causal": {
        "batch": len(EDGES),
        "tokens": 300,
        "slots": 600,
        "start": EDGES,
        "window": 129,
        "causal": True,
        "loudness": 1.0,
    },
    "rows past every key beside rows that see some": {
        "batch": 2,
        "tokens": 256,
        "slots": 384,
        "start": [200, 330],
        "lengths": [256, 500],
        "window": 100,
        "loudness": 1.0,
    },
    "more programs than items": {"programs": 148},
    "a large poison past the length, head dim 128": {
        "head_dim": 128,
        "overlay": "none",
        "lengths": [170],
        "poison": 1e30,
    },
}

FAULTS = {
    "barrier weights_ready": {},
    "commit scores_ready": {},
    "wait_load_tmem": {},
}
SLOW_FAULTS = {
    "barrier accumulator_ready": {},
    "barrier growth_ready": {},
    "barrier keys_used": {},
    "barrier normalisation_ready": {},
    "barrier product_done": {},
    "barrier query_used": {"heads": 2, "slots": 128},
    "barrier scores_ready": {},
    "barrier values_used": {},
    "barrier weights_used": {"head_dim": 128, "overlay": "wait"},
    "commit keys_used": {},
    "commit product_done": {},
    "commit values_used": {},
    "commit_smem": {},
    "commit_tmem": {},
    "wait keys_loaded": {},
    "wait keys_used": {},
    "wait query_loaded": {},
    "wait scores_ready": {},
    "wait values_loaded": {},
    "wait_smem_to_gmem": {"heads": 2},
    "overlay": {"head_dim": 128, "overlay": "in_order"},
}
FAULTY = {"tokens": 256, "slots": 512, "programs": 1, "kv_stages": 2, "out_stages": 2}


def marked(quick, slow):
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("name", marked(CASES, SLOW_CASES))
def test_attention_is_near_float64_and_nothing_races(name):
    case = (CASES | SLOW_CASES)[name]
    outcome = run_case("forward_cases:accuracy", **case)
    assert outcome.error is None, outcome.log
    assert not outcome.races, outcome.log
    assert outcome.figures["unsupported"] is None
    assert wrong(outcome.figures, case) == [], outcome.figures


@pytest.mark.parametrize("fault", marked(FAULTS, SLOW_FAULTS))
def test_a_missing_synchronisation_is_detected(fault):
    case = FAULTY | (FAULTS | SLOW_FAULTS)[fault]
    function = "accuracy" if fault == "overlay" else "faulty"
    extra = {} if fault == "overlay" else {"fault": fault}
    outcome = run_case(f"forward_cases:{function}", **extra, **case)
    assert outcome.detection in expected(fault), outcome.log


@pytest.mark.parametrize("name", marked(list(FORWARD)[:1], list(FORWARD)[1:]))
def test_a_slip_of_the_hand_is_refused(name):
    slip = FORWARD[name]
    case = (CASES | SLOW_CASES)[slip.case]
    outcome = slip.run("forward_cases:accuracy", case)
    assert how_refused(outcome, wrong, case) in slip.refusals, outcome.log


def shapes(**changes):
    given = {
        "query": (2, 256, 4, 128),
        "key": (2, 256, 2, 128),
        "value": (2, 256, 2, 128),
        "dtype": jnp.bfloat16,
    } | changes
    arrays = [jax.ShapeDtypeStruct(given[x], given["dtype"]) for x in ("query", "key", "value")]
    return [*arrays, None, None]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"query": (2, 256, 4, 96), "key": (2, 256, 2, 96), "value": (2, 256, 2, 96)}, "96"),
        ({"value": (2, 128, 2, 128)}, "one shape"),
        ({"query": (2, 0, 4, 128)}, "nothing to do"),
    ],
)
def test_unsupported_says_why(changes, reason):
    options = {"causal": True, "scale": 0.1, "soft_cap": None, "window": None}
    assert forward_sm100.unsupported(*shapes(), **options) is None
    assert reason in (forward_sm100.unsupported(*shapes(**changes), **options) or "")


def test_unsupported_names_the_memory_that_a_configuration_overflows():
    options = {"causal": True, "scale": 0.1, "soft_cap": None, "window": None}
    config = ForwardConfig(overlay="none")
    assert "tensor memory" in (forward_sm100.unsupported(*shapes(), **options, config=config) or "")
