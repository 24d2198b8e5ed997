"""Doing something or nothing, without copying what it would change."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Bool


def run_if[T](predicate: Bool[Array, ""], update: Callable[[T], T], state: T) -> T:
    """`update(state)` where the predicate holds, else the state as it is.

    This is a loop of at most one turn: XLA updates a loop's buffers in place, but copies whatever
    enters and leaves a conditional, which for a cache takes longer than a decoding step saves.
    """

    def turn(carry: tuple[Array, T]) -> tuple[Array, T]:
        return jax.numpy.zeros_like(carry[0]), update(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], turn, (predicate, state))[1]
