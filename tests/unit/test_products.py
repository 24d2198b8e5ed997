"""Products of few tokens: the form for one thread gives what XLA's own product gives."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_jax.models import products
from ssd_jax.models.products import multiply, project


def arrays(num_rows, num_tokens, width, outputs, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_tokens, width))
    weights = rng.standard_normal((width, *outputs)) / np.sqrt(width)
    return jnp.asarray(x, dtype), jnp.asarray(weights, dtype)


@pytest.fixture
def one_thread(monkeypatch):
    """Every product takes the form for one thread, however small its weights are."""
    monkeypatch.setattr(products, "computes_on_one_thread", lambda: True)
    monkeypatch.setattr(products, "_CACHED_WEIGHTS", 0)


def loops_of(x, weights):
    return (
        jax.jit(lambda *arrays: project(*arrays))
        .lower(x, weights)
        .as_text()
        .count("stablehlo.while")
    )


@given(
    num_rows=st.integers(1, 3),
    num_tokens=st.integers(1, 3),
    width=st.sampled_from([8, 64, 136, 192]),
    outputs=st.sampled_from([(1,), (40,), (3, 8), (2, 3, 4), (1500,), (4097,)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_rows_add_up_to_the_product(num_rows, num_tokens, width, outputs, dtype):
    x, weights = arrays(num_rows, num_tokens, width, outputs, dtype)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(weights, np.float64), axes=1)
    got = jax.jit(products._add_rows)(x, weights)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wanted", [None, jnp.float32])
def test_both_forms_give_the_same(one_thread, dtype, wanted):
    x, weights = arrays(1, 2, 64, (3, 8), dtype)
    bias = jnp.arange(24, dtype=dtype).reshape(3, 8)
    assert loops_of(x, weights) == 1
    got = project(x, weights, bias.astype(wanted or dtype), wanted)
    expected = multiply(x, weights, wanted or dtype) + bias.astype(wanted or dtype)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "loops"),
    [
        (jnp.float32, 1, 1),
        (jnp.float32, 8, 1),
        (jnp.float32, 9, 0),
        (jnp.bfloat16, 2, 1),
        (jnp.bfloat16, 3, 0),
        (jnp.float16, 1, 0),
    ],
)
def test_many_tokens_and_other_dtypes_keep_the_product(one_thread, dtype, num_tokens, loops):
    assert loops_of(*arrays(1, num_tokens, 64, (32,), dtype)) == loops


def test_a_width_that_does_not_divide_keeps_the_product(one_thread):
    assert loops_of(*arrays(1, 1, 60, (32,), jnp.float32)) == 0


def test_small_float32_weights_and_several_threads_keep_the_product(monkeypatch):
    x, weights = arrays(1, 1, 64, (32,), jnp.float32)
    monkeypatch.setattr(products, "computes_on_one_thread", lambda: True)
    assert loops_of(x, weights) == 0
    monkeypatch.setattr(products, "computes_on_one_thread", lambda: False)
    monkeypatch.setattr(products, "_CACHED_WEIGHTS", 0)
    assert loops_of(x, weights) == 0


def test_no_copy_of_the_weights_is_made(one_thread):
    x, weights = arrays(1, 1, 64, (2, 48), jnp.bfloat16)
    text = jax.jit(lambda *arrays: project(*arrays)).lower(x, weights).compile().as_text()
    assert "f32[64,96]" not in text
    assert "f32[64,2,48]" not in text


@pytest.mark.parametrize("transposed", [False, True])
def test_one_bfloat16_row_is_computed_as_if_it_were_two(transposed):
    x, weights = arrays(1, 1, 32, (48,), jnp.bfloat16)
    weights = jnp.asarray(np.asarray(weights).T.copy()).T if transposed else weights
    compute = jax.jit(multiply, static_argnums=2)
    one = compute(x, weights, jnp.bfloat16)
    two = compute(jnp.concatenate([x, x]), weights, jnp.bfloat16)
    assert one.shape == (1, 1, 48)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(two[0], two[1])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux pins processes to cores")
@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("os.environ['NPROC'] = '1'", True),
        ("os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])", True),
        ("split_cpu()", None),
        ("pass", None),
    ],
)
def test_a_process_knows_whether_it_computes_on_one_thread(before, expected):
    cores = len(os.sched_getaffinity(0))
    if expected is None:  # split: a core for the draft and the others for the target
        if cores == 1:
            pytest.skip("needs two cores")
        expected = before != "pass" and cores == 2
    code = (
        "import os\n"
        "from ssd_jax.cpu_clients import computes_on_one_thread, split_cpu\n"
        f"{before}\nprint(computes_on_one_thread())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NPROC"}
    environment["JAX_PLATFORMS"] = "cpu"
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(expected)
