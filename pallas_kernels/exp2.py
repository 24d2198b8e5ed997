"""2**x by a polynomial: multiplications and additions instead of the special function unit.

An attention kernel needs one exponential per score, and a Blackwell SM computes 16 of them per
clock beside 8192 matrix FLOPs: both take equally long at head dim 128. Computing some of the
exponentials on the multiply-add units takes that limit away.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

LOG2_E = math.log2(math.e)  # natural logarithm times this is the logarithm to base 2

# 1.5 * 2**23: a float32 of that size has no bits after the point, so adding it rounds to an
# integer and leaves that in the low bits. The half keeps the exponent for negative summands.
_ROUNDER = np.float32(3 << 22)
_ROUNDER_LOW_BITS = 23
# Below this the polynomial, which can be under 1, would take the exponent field under zero.
SMALLEST_EXPONENT = -125.0

# Found by `fit_coefficients`, rounded to float32; a test fits them again. Largest relative errors
# of the float32 evaluation: 7.5e-5, 2.7e-6, 2.2e-7. bfloat16 rounds by up to 3.9e-3.
COEFFICIENTS = {
    3: (0.999928057, 0.693260968, 0.242611125, 0.0551716685),
    4: (0.999999285, 0.693121791, 0.240247443, 0.0559178591, 0.00957010221),
    5: (1.00000012, 0.693146944, 0.240221202, 0.0555071309, 0.00967554096, 0.00132764725),
}


def fit_coefficients(degree: int) -> tuple[float, ...]:
    """The polynomial, lowest power first, with the least largest relative error from 2**x.

    On [-1/2, 1/2], by Remez's exchange in float64: the polynomial whose error takes the same size
    with alternating sign at degree + 2 points, the points moved to where the error is largest.
    """
    grid = np.linspace(-0.5, 0.5, 20001)
    points = -0.5 * np.cos(np.pi * np.arange(degree + 2) / (degree + 1))
    coefficients = np.zeros(degree + 1)
    for _ in range(20):
        signs = (-1.0) ** np.arange(degree + 2)
        system = np.column_stack(
            [np.vander(points, degree + 1, increasing=True), signs * 2**points]
        )
        coefficients = np.linalg.solve(system, 2**points)[:-1]
        error = np.polyval(coefficients[::-1], grid) / 2**grid - 1
        # Between two changes of sign lies one extremum: those are the next points.
        stretches = np.split(np.arange(grid.size), np.flatnonzero(np.diff(np.sign(error))) + 1)
        points = np.array([grid[i[np.argmax(np.abs(error[i]))]] for i in stretches])
    return tuple(float(c) for c in coefficients)


def exp2_polynomial(x: Float[Array, "..."], *, degree: int = 3) -> Float[Array, "..."]:
    """2**x in float32 for x below 128, without the special function unit.

    Below -125 the result stays at 2**-125. NaN gives NaN on a CPU; a GPU's NaN has other bits and
    may come out as a large number, so a caller that must keep NaN sends part of a row through
    `exp2`. Source: the split into an integer and a fraction of FlashAttention-4 (flash_attn/cute),
    but rounded to nearest, which needs no special instruction.
    """
    x = lax.max(x, jnp.float32(SMALLEST_EXPONENT))
    # Without the barrier XLA on a CPU (jaxlib 0.11.2) simplifies (x + c) - c to x.
    shifted = lax.optimization_barrier(x + _ROUNDER)
    fraction = x - (shifted - _ROUNDER)
    *rest, result = (jnp.float32(c) for c in COEFFICIENTS[degree])
    for coefficient in reversed(rest):
        result = result * fraction + coefficient
    exponent = lax.bitcast_convert_type(shifted, jnp.int32) << _ROUNDER_LOW_BITS
    bits = lax.bitcast_convert_type(result, jnp.int32) + exponent
    return lax.bitcast_convert_type(bits, jnp.float32)
