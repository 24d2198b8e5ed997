"""What the speculative loop asks of a drafter, and the drafters as it takes them.

A drafter is a frozen, hashable description (a static argument of the loop); what it remembers is a
pytree that goes in and comes out.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import PyTree

from ssd_jax.config import ModelConfig
from ssd_jax.drafting.draft_model import draft_tokens
from ssd_jax.drafting.ngram import NgramConfig, NgramState, draft_ngram, update_ngram
from ssd_jax.types import DecodeState, Draft, KVCache, ModelParams, Sampling
from ssd_jax.verification import Verification


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens in front of a verification and learns from its outcome.

    `draft_len` is the most tokens it proposes; `may_decline` says that it may propose none at all
    for a whole batch, for which the loop then takes a plain step.
    """

    @property
    def draft_len(self) -> int: ...  # noqa: D102

    @property
    def may_decline(self) -> bool: ...  # noqa: D102

    def draft(
        self, params: PyTree, sampling: Sampling, target: DecodeState, state: PyTree
    ) -> tuple[Draft, PyTree]:
        """Tokens for every row, and the drafter's state after proposing them."""
        ...

    def learn(self, before: DecodeState, after: DecodeState, state: PyTree) -> PyTree:
        """The drafter's state once the text grew from `before` to `after`."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelDrafter:
    """A second model; its state is its cache."""

    config: ModelConfig
    draft_len: int
    verification: Verification
    may_decline: bool = False

    def draft(
        self, params: ModelParams, sampling: Sampling, target: DecodeState, state: KVCache
    ) -> tuple[Draft, KVCache]:
        """`draft_len` tokens for every row that is not near its limit."""
        return draft_tokens(
            self.config, params, sampling, target, state, self.draft_len, self.verification
        )

    def learn(self, before: DecodeState, after: DecodeState, state: KVCache) -> KVCache:
        """The cache cut back to the text; its last drafted token was never fed."""
        fed = before.lengths - 1 + self.draft_len
        return dataclasses.replace(state, lengths=jnp.minimum(after.lengths - 1, fed))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NgramDrafter:
    """Copies what followed the same n tokens before; it has no weights."""

    config: NgramConfig
    may_decline: bool = True

    @property
    def draft_len(self) -> int:
        """Most tokens in a draft."""
        return self.config.max_draft

    def draft(
        self, params: None, sampling: Sampling, target: DecodeState, state: NgramState
    ) -> tuple[Draft, NgramState]:
        """Point masses, or none where the text's end was not seen before."""
        draft = draft_ngram(self.config, state, target.tokens, target.lengths)
        room = jnp.maximum(sampling.max_length - target.lengths - 1, 0)
        return dataclasses.replace(draft, count=jnp.minimum(draft.count, room)), state

    def learn(self, before: DecodeState, after: DecodeState, state: NgramState) -> NgramState:
        """The tables with the new tokens in them."""
        return update_ngram(
            self.config,
            state,
            after.tokens,
            before.lengths,
            after.lengths,
            width=self.draft_len + 1,
        )
