"""Drafts as values: without a law, cut where the draft failed, and two drafts' rows in one."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssd_jax.types import NO_TOKEN, Draft


def point_masses(tokens: Int[Array, "B J"], count: Int[Array, "B"]) -> Draft:
    """A draft without a law, of a loop's first drafter."""
    return Draft(tokens=tokens, count=count, law=None, drafter=jnp.zeros_like(count))


def cut_at_failure(draft: Draft) -> Draft:
    """The draft up to the first NO_TOKEN of each row, which its drafter had no law for.

    What a draft model cannot compute is thereby not drafted: the target goes on by itself.
    """
    is_token = draft.tokens != NO_TOKEN
    possible = jnp.sum(jnp.cumprod(is_token.astype(jnp.int32), axis=1), axis=1)
    return dataclasses.replace(
        draft,
        tokens=jnp.where(is_token, draft.tokens, 0),
        count=jnp.minimum(draft.count, possible),
    )


def choose_rows(use_first: Bool[Array, "B"], first: Draft, second: Draft) -> Draft:
    """The rows of one draft or of the other, as long as the longer; `drafter` says which (0 or 1).

    Where only one of them has a law, the other's tokens are spelt out as point masses.
    """
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    first, second = _widen(first, width), _widen(second, width)
    law = None
    laws = [draft.law for draft in (first, second) if draft.law is not None]
    if laws:
        vocab_size = laws[0].shape[-1]
        law = jnp.where(
            use_first[:, None, None], _law_of(first, vocab_size), _law_of(second, vocab_size)
        )
    return Draft(
        tokens=jnp.where(use_first[:, None], first.tokens, second.tokens),
        count=jnp.where(use_first, first.count, second.count),
        law=law,
        drafter=jnp.where(use_first, 0, 1).astype(jnp.int32),
    )


def _law_of(draft: Draft, vocab_size: int) -> Float[Array, "B J V"]:
    """Log-probabilities that the draft was drawn from; all on its own tokens if it has no law."""
    if draft.law is not None:
        return draft.law
    vocabulary = jnp.arange(vocab_size, dtype=draft.tokens.dtype)
    return jnp.where(draft.tokens[..., None] == vocabulary, 0.0, -jnp.inf)


def _widen(draft: Draft, width: int) -> Draft:
    """The draft with zeros up to `width` positions."""
    missing = width - draft.tokens.shape[1]
    law = draft.law
    if law is not None:
        law = jnp.pad(law, ((0, 0), (0, missing), (0, 0)))
    tokens = jnp.pad(draft.tokens, ((0, 0), (0, missing)))
    return dataclasses.replace(draft, tokens=tokens, law=law)
