"""n-gram drafting, kind "simple": copy what followed the last earlier occurrence."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from ssd_jax.drafting.ngram_hash import (
    copy_draft,
    equal_before,
    hash_grams,
    init_table,
    new_positions,
    raise_entries,
    read_entries,
    window_before,
)
from ssd_jax.types import Draft


@struct.dataclass
class SimpleState:
    """Where each context of a row was last followed by a token: position of that token."""

    last: Int[Array, "B M"]


def init_simple(batch_size: int, num_slots: int) -> SimpleState:
    """The state that knows no text."""
    return SimpleState(last=init_table(batch_size, num_slots))


def update_simple(
    state: SimpleState,
    tokens: Int[Array, "B S"],
    known: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    n: int,
    width: int,
) -> SimpleState:
    """The state that also knows the tokens at known .. lengths - 1, at most `width` a row.

    It depends on the text alone, not on the updates it was learnt in.
    """
    hashes = hash_grams(window_before(tokens, known, n, width - 1), n)
    positions = new_positions(known, lengths, n, width)
    return SimpleState(last=raise_entries(state.last, hashes, positions))


def draft_simple(
    state: SimpleState,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    *,
    n: int,
    max_draft: int,
) -> Draft:
    """The tokens after the last earlier occurrence of each text's last n tokens.

    An occurrence counts only where all n tokens are equal. Drafts are `max_draft` long or empty
    (see `copy_draft`).
    """
    tail = window_before(tokens, lengths, n, 0)
    candidates = read_entries(state.last, hash_grams(tail, n))
    holds = equal_before(tokens, candidates, tail[:, None])
    source = jnp.max(jnp.where(holds, candidates, -1), axis=(1, 2))
    return copy_draft(tokens, lengths, source, max_draft)
