"""Hashes of n-grams and the per-row tables keyed by them, shared by the kinds of n-gram drafting.

A token at position p >= n has a context: the n tokens before it. All kinds learn from such pairs of
context and continuation, and ask for the continuation of a text's last n tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from ssd_jax.drafting.drafts import point_masses
from ssd_jax.types import Draft

MULTIPLIER = 1664525  # of the linear congruential generator in Numerical Recipes
NUM_CHOICES = 4
_STEP = 0x9E3779B9  # 2**32 over the golden ratio: sets the choices apart


def window_before(
    tokens: Int[Array, "B S"], first: Int[Array, "B"], n: int, width: int
) -> Int[Array, "B C"]:
    """The n tokens before position `first` and the `width` from there on (C = n + width).

    Columns that lie outside the buffer hold some token of it.
    """
    columns = (first - n)[:, None] + jnp.arange(n + width, dtype=jnp.int32)
    return jnp.take_along_axis(tokens, jnp.clip(columns, 0, tokens.shape[1] - 1), axis=1)


def hash_grams(window: Int[Array, "B C"], n: int) -> UInt32[Array, "B C-n+1"]:
    """The hash of every n-gram of a window, by the position it starts at.

    It is the sum of token * MULTIPLIER**(tokens that follow it) modulo 2**32, so that it can roll.
    """
    words = window.astype(jnp.uint32)
    num_grams = window.shape[1] - n + 1
    hashes = jnp.zeros((window.shape[0], num_grams), jnp.uint32)
    for offset in range(n):
        hashes = hashes * jnp.uint32(MULTIPLIER) + words[:, offset : offset + num_grams]
    return hashes


def mix(hashes: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Hashes whose every bit depends on every bit of the input (the lowbias32 finalizer)."""
    hashes = (hashes ^ (hashes >> 16)) * jnp.uint32(0x7FEB352D)
    hashes = (hashes ^ (hashes >> 15)) * jnp.uint32(0x846CA68B)
    return hashes ^ (hashes >> 16)


def new_positions(
    known: Int[Array, "B"], lengths: Int[Array, "B"], n: int, width: int
) -> Int[Array, "B W"]:
    """Positions known .. lengths - 1 that have a context, at most `width` of them; -1 elsewhere."""
    positions = known[:, None] + jnp.arange(width, dtype=jnp.int32)
    return jnp.where((positions >= n) & (positions < lengths[:, None]), positions, -1)


def init_table(batch_size: int, num_slots: int) -> Int[Array, "B M"]:
    """An empty table for the contexts of a text of up to `num_slots` tokens.

    It is NUM_CHOICES parts, each of 2 to 4 entries a text position. A key has one entry in each
    part, and of all that is written to an entry the largest value stays. So the contents do not
    depend on the order of writing, and a key is lost only where larger values hit it in all parts:
    below 2.5 % for the oldest key of a full text without any repeat, and far below for the rest.
    """
    part = 1 << (2 * num_slots - 1).bit_length()
    return jnp.full((batch_size, NUM_CHOICES * part), -1, jnp.int32)


def raise_entries(
    table: Int[Array, "B M"], hashes: UInt32[Array, "B W"], values: Int[Array, "B W"]
) -> Int[Array, "B M"]:
    """The table after each value was offered to the entries of its key; -1 offers nothing."""
    rows = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None, None]
    return table.at[rows, _entries(table, hashes)].max(values[:, :, None])


def read_entries(table: Int[Array, "B M"], hashes: UInt32[Array, "B W"]) -> Int[Array, "B W A"]:
    """What the entries of each key hold: -1 or a value, possibly of another key."""
    rows = jnp.arange(table.shape[0], dtype=jnp.int32)[:, None, None]
    return table[rows, _entries(table, hashes)]


def equal_before(
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B W A"],
    grams: Int[Array, "B W n"],
) -> Bool[Array, "B W A"]:
    """Whether the tokens right before each position are the given ones; not so before n."""
    n = grams.shape[-1]
    equal = positions >= n
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None, None]
    for offset in range(n):
        found = tokens[rows, jnp.maximum(positions - n + offset, 0)]
        equal &= found == grams[:, :, offset, None]
    return equal


def copy_draft(
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    source: Int[Array, "B"],
    max_draft: int,
) -> Draft:
    """The `max_draft` tokens from `source` on as a draft; none where `source` is -1.

    A copy that reaches the text's end goes on with what it has drafted, that is, it repeats the
    text from `source` to the end: a text that runs in a loop is drafted to full length.
    """
    found = source >= 0
    period = jnp.where(found, lengths - source, 1)
    offsets = jnp.arange(max_draft, dtype=jnp.int32) % period[:, None]
    copied = jnp.take_along_axis(tokens, jnp.maximum(source, 0)[:, None] + offsets, axis=1)
    count = jnp.where(found, max_draft, 0).astype(jnp.int32)
    return point_masses(jnp.where(found[:, None], copied, 0), count)


def _entries(table: Int[Array, "B M"], hashes: UInt32[Array, "B W"]) -> Int[Array, "B W A"]:
    part = table.shape[1] // NUM_CHOICES
    choices = jnp.arange(NUM_CHOICES, dtype=jnp.uint32)
    mixed = mix(hashes[:, :, None] + choices * jnp.uint32(_STEP))
    return ((mixed & jnp.uint32(part - 1)) + choices * jnp.uint32(part)).astype(jnp.int32)
