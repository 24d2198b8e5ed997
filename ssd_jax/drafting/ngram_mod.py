"""n-gram drafting, kind "mod": one table from hashed contexts to next tokens, for all rows.

The table has a constant size whatever the texts' lengths and keeps no keys: contexts that share an
entry share its token, which costs a wrong draft and nothing else. What one row learns, all draft.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, UInt32

from ssd_jax.drafting.drafts import point_masses
from ssd_jax.drafting.ngram_hash import (
    MULTIPLIER,
    hash_grams,
    mix,
    new_positions,
    window_before,
)
from ssd_jax.types import Draft

EMPTY = -1


@struct.dataclass
class ModState:
    """The token that last followed the contexts of each entry, or -1; P is a power of two."""

    next_tokens: Int[Array, "P"]


def init_mod(table_size: int) -> ModState:
    """The state that knows no text."""
    return ModState(next_tokens=jnp.full(table_size, EMPTY, jnp.int32))


def update_mod(
    state: ModState,
    tokens: Int[Array, "B S"],
    known: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    n: int,
    width: int,
) -> ModState:
    """The state that also knows the tokens at known .. lengths - 1, at most `width` a row.

    Of tokens that want the same entry, the one at the later position gets it, at equal positions
    the one of the later row.
    """
    table = state.next_tokens
    window = window_before(tokens, known, n, width)
    positions = new_positions(known, lengths, n, width)
    nowhere = table.shape[0]
    entries = jnp.where(positions >= 0, _entry(table, hash_grams(window[:, :-1], n)), nowhere)
    batch_size = tokens.shape[0]
    ranks = positions * batch_size + jnp.arange(batch_size, dtype=jnp.int32)[:, None]
    # The rivals' ranks are compared in the table itself; then the winners write their tokens.
    table = table.at[entries].set(EMPTY, mode="drop").at[entries].max(ranks, mode="drop")
    won = table.at[entries].get(mode="fill", fill_value=EMPTY) == ranks
    table = table.at[jnp.where(won, entries, nowhere)].set(window[:, n:], mode="drop")
    return ModState(next_tokens=table)


def draft_mod(
    state: ModState,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    *,
    n: int,
    max_draft: int,
    min_draft: int,
) -> Draft:
    """Chained lookups from each text's last n tokens on, until an entry is empty.

    Each drafted token rolls the hash on. Drafts shorter than `min_draft` are dropped. Takes time
    for the longest draft of the batch, not for `max_draft`.
    """
    table = state.next_tokens
    window = window_before(tokens, lengths, n, max_draft)
    hashes = hash_grams(window[:, :n], n)[:, 0]
    leaving = jnp.uint32(pow(MULTIPLIER, n, 2**32))

    def going(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        step, alive, *_ = carry
        return (step < max_draft) & jnp.any(alive)

    def look_up(
        carry: tuple[Array, Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array, Array]:
        step, alive, hashes, window, count = carry
        found = table[_entry(table, hashes)]
        alive &= found != EMPTY
        token = jnp.where(alive, found, 0)
        oldest = jax.lax.dynamic_index_in_dim(window, step, axis=1, keepdims=False)
        window = jax.lax.dynamic_update_index_in_dim(window, token, n + step, axis=1)
        hashes = hashes * jnp.uint32(MULTIPLIER) + token.astype(jnp.uint32)
        hashes -= oldest.astype(jnp.uint32) * leaving
        return step + 1, alive, hashes, window, count + alive.astype(jnp.int32)

    start = (jnp.int32(0), lengths >= n, hashes, window, jnp.zeros_like(lengths))
    _, _, _, window, count = jax.lax.while_loop(going, look_up, start)
    count = jnp.where(count >= min_draft, count, 0)
    drafted = jnp.arange(max_draft, dtype=jnp.int32) < count[:, None]
    return point_masses(jnp.where(drafted, window[:, n:], 0), count)


def _entry(table: Int[Array, "P"], hashes: UInt32[Array, "..."]) -> Int[Array, "..."]:
    return (mix(hashes) & jnp.uint32(table.shape[0] - 1)).astype(jnp.int32)
