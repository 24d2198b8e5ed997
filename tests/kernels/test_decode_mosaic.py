"""The decode kernels in the interpreter: values, races, and that faults are caught."""

import jax
import jax.numpy as jnp
import pytest
from decode_cases import wrong
from edges import EDGES
from faults import PRODUCT_WAIT, expected, how_refused
from slips import DECODE, DECODE_SM90, DECODE_SM100

from pallas_kernels import decode_sm100
from pallas_kernels.proof.interpret import run_case

CASES = {
    # Splits of unequal length, a row that sees nothing, NaN past every length.
    "ragged": {"num_rows": 8, "lengths": [400, 0], "split_blocks": 3, "spoil": True},
    # Nothing is merged, and a row still may see nothing.
    "one split": {"num_rows": 8, "lengths": [400, 0], "split_blocks": 4, "spoil": True},
    "tree": {"num_rows": 16, "lengths": [250], "num_slots": 256, "with_bits": True},
    "pages": {
        "num_rows": 16,
        "lengths": [250, 129],
        "page_slots": 64,
        "num_slots": 256,
        "kv_heads": 2,
        "spoil": True,
    },
    # One row is so quiet that its maximum, once found, often stays.
    "edges": {
        "num_rows": 1,
        "lengths": [*EDGES, 511, 511],
        "factor": [1.0] * (1 + len(EDGES)) + [0.01],
        "split_blocks": 4,
        "spread": 1,
        "scale": 0.3,
        "spoil": True,
        "head_dim": 64,
    },
}
SLOW_CASES = {
    "two tiles, tree": {
        "num_rows": 136,
        "lengths": [200],
        "num_slots": 256,
        "head_dim": 64,
        "tiles": 2,
        "with_bits": True,
        "spoil": True,
    },
    "float16": {
        "num_rows": 20,
        "dtype": "float16",
        "lengths": [260],
        "num_slots": 384,
        "spoil": True,
    },
    "large pages": {"num_rows": 8, "page_slots": 256, "lengths": [400], "spoil": True},
    "several groups of rows": {"num_rows": 300, "tiles": 2, "lengths": [130], "num_slots": 256},
    "two tiles, long": {"num_rows": 160, "tiles": 2, "lengths": [500], "split_blocks": 4},
    "tree on several heads": {
        "num_rows": 40,
        "with_bits": True,
        "lengths": [400, 70],
        "kv_heads": 2,
        "split_blocks": 4,
        "spoil": True,
    },
    "one stage": {
        "num_rows": 8,
        "kv_stages": 1,
        "split_blocks": 4,
        "lengths": [511],
        "spoil": True,
    },
}
# Of both kernels, then of the Blackwell one, then of the Hopper one.
LOADED = ("wait rows_ready", "wait masks_ready", "wait keys_ready", "wait values_ready")
FREE = ("barrier keys_free", "barrier values_free", "commit_smem", "wait_smem_to_gmem")
TENSOR = (
    "barrier scores_ready",
    "barrier weights_ready",
    "barrier scores_free",
    "barrier out_ready",
    "commit keys_free",
    "commit values_free",
    "commit scores_ready",
    "commit scores_free",
    "commit out_ready",
    "wait_load_tmem",
    "commit_tmem",
)
FAULTS = [
    *(("sm_100", fault) for fault in (*LOADED, *FREE, *TENSOR)),
    *(("sm_90", fault) for fault in (*LOADED, *FREE, PRODUCT_WAIT)),
]
RAGGED_FAULTS = [  # who zeroes values that nobody has written: the kernel, its fault, row tiles
    *(("sm_100", "barrier ragged_values_ready", tiles) for tiles in (1, 2)),
    ("sm_90", "barrier values_zeroed", 2),
]
QUICK_FAULTS = [("sm_100", "barrier weights_ready"), ("sm_90", "barrier values_free")]


QUICK = [
    ("sm_100", "ragged"),
    ("sm_100", "tree"),
    ("sm_100", "edges"),
    ("sm_90", "edges"),
    ("sm_90", "one split"),
    ("sm_90", "pages"),
]


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(kernel, case, marks=() if (kernel, case) in QUICK else pytest.mark.slow)
        for kernel in ("sm_100", "sm_90")
        for case in CASES | SLOW_CASES
    ],
)
def test_values_and_races(kernel, case):
    options = (CASES | SLOW_CASES)[case]
    outcome = run_case("decode_cases:rows_and_limits", chip=kernel, kernel=kernel, **options)
    assert outcome.error is None, outcome.log
    assert not outcome.races
    assert wrong(outcome.figures, options) == [], outcome.figures


@pytest.mark.parametrize("tiles", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [pytest.param(*one, marks=() if one in QUICK_FAULTS else pytest.mark.slow) for one in FAULTS],
)
def test_a_missing_synchronisation_is_detected(kernel, fault, tiles):
    """Four blocks through two buffers, so that every buffer is used twice."""
    arguments = {"num_rows": 8 if tiles == 1 else 136, "tiles": tiles, "split_blocks": 4}
    outcome = run_case(
        "decode_cases:faulty", chip=kernel, timeout=90.0, kernel=kernel, fault=fault, **arguments
    )
    assert outcome.detection in expected(fault), outcome.log


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "fault", "tiles"), RAGGED_FAULTS)
def test_a_missing_synchronisation_of_zeros_is_detected(kernel, fault, tiles):
    arguments = {"num_rows": 8 if tiles == 1 else 136, "tiles": tiles, "lengths": [200]}
    outcome = run_case(
        "decode_cases:faulty", chip=kernel, timeout=90.0, kernel=kernel, fault=fault, **arguments
    )
    assert outcome.detection in expected(fault), outcome.log


SLIPS = [
    *(("sm_100", name, slip) for name, slip in (DECODE | DECODE_SM100).items()),
    *(("sm_90", name, slip) for name, slip in (DECODE | DECODE_SM90).items()),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "slip"),
    [pytest.param(kernel, slip, id=f"{kernel}-{name}") for kernel, name, slip in SLIPS],
)
def test_a_slip_of_the_hand_is_refused(kernel, slip):
    case = (CASES | SLOW_CASES)[slip.case]
    outcome = slip.run("decode_cases:rows_and_limits", case | {"kernel": kernel}, chip=kernel)
    assert how_refused(outcome, wrong, case) in slip.refusals, outcome.log


def shapes(head_dim=128, dtype=jnp.bfloat16, num_slots=1024, value_dtype=None):
    cache = jax.ShapeDtypeStruct((1, 2, num_slots, head_dim), dtype)
    values = jax.ShapeDtypeStruct(cache.shape, value_dtype or dtype)
    return jax.ShapeDtypeStruct((1, 8, head_dim), dtype), cache, values


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": jnp.float16, "head_dim": 64}, None),
        ({"dtype": jnp.float32}, "takes bfloat16 or float16, the same for all, got float32"),
        ({"value_dtype": jnp.float16}, "the same for all, got bfloat16, float16"),
        ({"head_dim": 96}, "takes head dims 64 and 128, got 96"),
        ({"num_slots": 1000}, "takes caches of a multiple of 128 slots, got 1000"),
    ],
)
def test_reasons(changes, reason):
    got = decode_sm100.KERNELS["decode_attention"].unsupported(
        *shapes(**changes), jax.ShapeDtypeStruct((1,), jnp.int32), scale=1.0
    )
    assert got == reason or (reason is not None and reason in got)


@pytest.mark.parametrize(
    ("page_slots", "num_pages", "reason"),
    [
        (16, 8, None),
        (256, 3, None),
        (16, 9, "takes caches of a multiple of 128 slots, got 144"),
        (96, 4, "takes pages of a part or a multiple of 128 slots, got 96"),
    ],
)
def test_reasons_for_pages(page_slots, num_pages, reason):
    table = jax.ShapeDtypeStruct((1, num_pages), jnp.int32)
    got = decode_sm100.KERNELS["decode_attention"].unsupported(
        *shapes(num_slots=page_slots), None, scale=1.0, page_table=table
    )
    assert got == reason


def test_too_many_rows_are_refused():
    query = jax.ShapeDtypeStruct((1, 512, 8, 128), jnp.bfloat16)
    got = decode_sm100.KERNELS["verify_attention"].unsupported(
        query, *shapes()[1:], None, scale=1.0
    )
    assert got == "takes up to 1024 query rows a kv head, got 2048"
