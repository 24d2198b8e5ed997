"""n-gram drafting, kind "map": copy the most frequent continuation of a context.

A continuation is the token that followed the context, its hits are how often it did. Hits are
counted where tokens are learnt: what they came to before, and how often the same context and token
are among the new ones. The best continuation is then the place with the most hits, of these the
latest, and both tables hold the two in one number: `hits * span + position`.
"""

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
class MapState:
    """Hits and positions: of each context's best continuation, and of each context with its token.

    Entries are -1 or `hits * span + position`, where span is the power of two at or above S.
    """

    best: Int[Array, "B M"]
    counted: Int[Array, "B M"]


def init_map(batch_size: int, num_slots: int) -> MapState:
    """The state that knows no text."""
    return MapState(
        best=init_table(batch_size, num_slots), counted=init_table(batch_size, num_slots)
    )


def update_map(
    state: MapState,
    tokens: Int[Array, "B S"],
    known: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    n: int,
    width: int,
) -> MapState:
    """The state that also knows the tokens at known .. lengths - 1, at most `width` a row.

    It depends on the text alone, not on the updates it was learnt in, as long as no key is lost
    from `counted`. Time and memory grow with the square of `width`.
    """
    span = _span(tokens.shape[1])
    window = window_before(tokens, known, n, width)
    positions = new_positions(known, lengths, n, width)
    grams = jnp.stack([window[:, k : k + width] for k in range(n + 1)], axis=-1)
    gram_hashes = hash_grams(window, n + 1)
    earlier = read_entries(state.counted, gram_hashes)
    holds = equal_before(tokens, _after(earlier, span), grams)
    before = jnp.max(jnp.where(holds, earlier // span, 0), axis=-1)
    same = jnp.ones((tokens.shape[0], width, width), bool)
    for k in range(n + 1):
        same &= grams[:, :, None, k] == grams[:, None, :, k]
    real = positions >= 0
    here = jnp.sum(same & real[:, None, :], axis=-1, dtype=jnp.int32)
    most = jnp.iinfo(jnp.int32).max // span
    hits = jnp.minimum(before + here, most)
    values = jnp.where(real, hits * span + positions, -1)
    return MapState(
        best=raise_entries(state.best, hash_grams(window[:, :-1], n), values),
        counted=raise_entries(state.counted, gram_hashes, values),
    )


def draft_map(
    state: MapState,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    *,
    n: int,
    max_draft: int,
    min_hits: int,
) -> Draft:
    """The tokens from each text's best continuation on, where it has `min_hits` hits.

    The best continuation of the last n tokens is the token that followed them most often, of
    equally frequent ones the latest, and the copy starts at its last place. Drafts are `max_draft`
    long or empty (see `copy_draft`).
    """
    span = _span(tokens.shape[1])
    tail = window_before(tokens, lengths, n, 0)
    candidates = read_entries(state.best, hash_grams(tail, n))
    places = jnp.where(candidates >= 0, candidates % span, -1)
    holds = equal_before(tokens, places, tail[:, None])
    best = jnp.max(jnp.where(holds, candidates, -1), axis=(1, 2))
    source = jnp.where(best // span >= min_hits, best % span, -1)
    return copy_draft(tokens, lengths, source, max_draft)


def _after(entries: Int[Array, "..."], span: int) -> Int[Array, "..."]:
    """The position after each entry's token; 0 for empty entries."""
    return jnp.where(entries >= 0, entries % span + 1, 0)


def _span(num_slots: int) -> int:
    return 1 << (num_slots - 1).bit_length()
