import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.exp2 import COEFFICIENTS, exp2_polynomial, fit_coefficients

LARGEST_ERRORS = {3: 7.6e-5, 4: 2.8e-6, 5: 2.5e-7}
POINTS = np.linspace(-124.9, 20.0, 200_001).astype(np.float32)


@pytest.mark.parametrize("degree", sorted(COEFFICIENTS))
def test_coefficients_are_those_that_the_fit_finds(degree):
    np.testing.assert_array_equal(
        np.float32(COEFFICIENTS[degree]), np.float32(fit_coefficients(degree))
    )


@pytest.mark.parametrize("degree", sorted(COEFFICIENTS))
def test_no_other_polynomial_of_that_degree_errs_less_often_on_both_sides(degree):
    """Chebyshev's criterion: degree + 2 equal extrema of alternating sign."""
    grid = np.linspace(-0.5, 0.5, 40_001)
    error = np.polyval(fit_coefficients(degree)[::-1], grid) / 2**grid - 1
    stretches = np.split(error, np.flatnonzero(np.diff(np.sign(error))) + 1)
    extrema = np.array([stretch[np.argmax(np.abs(stretch))] for stretch in stretches])
    assert len(extrema) == degree + 2
    np.testing.assert_allclose(np.abs(extrema), np.abs(extrema).max(), rtol=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("degree", sorted(COEFFICIENTS))
def test_exp2_polynomial_is_near_float64_also_when_xla_may_simplify(degree, jitted):
    def function(x):
        return exp2_polynomial(x, degree=degree)

    got = (jax.jit(function) if jitted else function)(jnp.asarray(POINTS))
    relative = np.asarray(got).astype(np.float64) / np.exp2(POINTS.astype(np.float64)) - 1
    assert np.abs(relative).max() < LARGEST_ERRORS[degree]


def test_exp2_polynomial_ends_at_a_tiny_positive_number_and_keeps_nan():
    got = jax.jit(exp2_polynomial)(jnp.float32([-jnp.inf, -1e30, -126.0, jnp.nan]))
    np.testing.assert_allclose(np.asarray(got)[:3], 2.0**-125, rtol=1e-4)
    assert np.isnan(got[3])
