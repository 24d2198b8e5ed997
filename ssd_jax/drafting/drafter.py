"""What the speculative loop asks of a drafter, and the drafters as it takes them.

A drafter is a frozen, hashable description (a static argument of the loop); what it remembers is a
pytree that goes in and comes out.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ssd_jax.config import ModelConfig
from ssd_jax.control_flow import run_if
from ssd_jax.drafting.draft_model import catch_up, draft_tokens, within_context
from ssd_jax.drafting.drafts import choose_rows, point_masses
from ssd_jax.drafting.ngram import NgramConfig, NgramState, draft_ngram, update_ngram
from ssd_jax.types import DecodeState, Draft, KVCache, ModelParams, Sampling
from ssd_jax.verification import Verification


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens in front of a verification and learns from its outcome.

    `names` lists whose drafts are told apart (P of them), `draft_len` is the most tokens of any
    draft; `may_decline` says that there may be none at all for a whole batch, for which the loop
    then takes a plain step.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def draft_len(self) -> int: ...  # noqa: D102

    @property
    def may_decline(self) -> bool: ...  # noqa: D102

    def draft(
        self,
        params: PyTree,
        sampling: Sampling,
        target: DecodeState,
        state: PyTree,
        limits: Int[Array, "P B"],
    ) -> tuple[Draft, PyTree]:
        """Up to `limits` tokens for every row, and the drafter's state after proposing them."""
        ...

    def learn(self, before: DecodeState, after: DecodeState, draft: Draft, state: PyTree) -> PyTree:
        """The drafter's state once the text grew from `before` to `after` with this draft."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NoDrafter:
    """Proposes nothing: the target alone, in passes as wide as for drafts of `draft_len` tokens."""

    draft_len: int
    names: tuple[str, ...] = ()
    may_decline: bool = False

    def draft(
        self,
        params: None,
        sampling: Sampling,
        target: DecodeState,
        state: None,
        limits: Int[Array, "P B"],
    ) -> tuple[Draft, None]:
        """No tokens."""
        rows = target.lengths.shape[0]
        tokens = jnp.zeros((rows, self.draft_len), jnp.int32)
        return point_masses(tokens, jnp.zeros(rows, jnp.int32)), None

    def learn(self, before: DecodeState, after: DecodeState, draft: Draft, state: None) -> None:
        """Nothing."""
        return


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelDrafter:
    """A second model; its state is its cache."""

    config: ModelConfig
    draft_len: int
    verification: Verification
    may_decline: bool
    names: tuple[str, ...] = ("draft",)

    def draft(
        self,
        params: ModelParams,
        sampling: Sampling,
        target: DecodeState,
        state: KVCache,
        limits: Int[Array, "P B"],
    ) -> tuple[Draft, KVCache]:
        """As many tokens as the limits allow; only a drafter that may decline can fall behind."""
        limit = jnp.minimum(limits[0], self.draft_len)
        limit = within_context(self.config, target.lengths, limit)

        def propose(cache: KVCache) -> tuple[Draft, KVCache]:
            if self.may_decline:
                cache = catch_up(self.config, params, target, cache)
            return draft_tokens(
                self.config,
                params,
                sampling,
                target,
                cache,
                limit,
                draft_len=self.draft_len,
                verification=self.verification,
            )

        if not self.may_decline:
            return propose(state)
        shapes = jax.eval_shape(propose, state)[0]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return run_if(jnp.any(limit > 0), lambda both: propose(both[1]), (nothing, state))

    def learn(
        self, before: DecodeState, after: DecodeState, draft: Draft, state: KVCache
    ) -> KVCache:
        """The cache cut back to the text and the accepted part of the draft."""
        accepted = jnp.minimum(after.lengths - 1 - before.lengths, draft.count)
        known = before.lengths + jnp.maximum(accepted, 0)
        return dataclasses.replace(state, lengths=jnp.minimum(state.lengths, known))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NgramDrafter:
    """Copies what followed the same n tokens before; it has no weights."""

    config: NgramConfig
    may_decline: bool = True
    names: tuple[str, ...] = ("ngram",)

    @property
    def draft_len(self) -> int:
        """Most tokens in a draft."""
        return self.config.max_draft

    def draft(
        self,
        params: None,
        sampling: Sampling,
        target: DecodeState,
        state: NgramState,
        limits: Int[Array, "P B"],
    ) -> tuple[Draft, NgramState]:
        """Point masses, or none where the text's end was not seen before."""
        draft = draft_ngram(self.config, state, target.tokens, target.lengths)
        return dataclasses.replace(draft, count=jnp.minimum(draft.count, limits[0])), state

    def learn(
        self, before: DecodeState, after: DecodeState, draft: Draft, state: NgramState
    ) -> NgramState:
        """The tables with the new tokens in them."""
        width = draft.tokens.shape[1] + 1
        return update_ngram(
            self.config, state, after.tokens, before.lengths, after.lengths, width=width
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CombinedDrafter:
    """n-grams first; the draft model for the rows where they have nothing."""

    ngram: NgramDrafter
    model: ModelDrafter
    may_decline: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Who may have made a draft."""
        return (*self.ngram.names, *self.model.names)

    @property
    def draft_len(self) -> int:
        """Most tokens in a draft of either."""
        return max(self.ngram.draft_len, self.model.draft_len)

    def draft(
        self,
        params: ModelParams,
        sampling: Sampling,
        target: DecodeState,
        state: tuple[NgramState, KVCache],
        limits: Int[Array, "P B"],
    ) -> tuple[Draft, tuple[NgramState, KVCache]]:
        """Rows of both kinds side by side; the model rests in rounds where every row has n-grams.

        Under rejection an n-gram row's law is spelt out as point masses.
        """
        tables, cache = state
        copied, tables = self.ngram.draft(None, sampling, target, tables, limits[:1])
        found = copied.count > 0
        asked = jnp.where(found, 0, limits[1:])
        proposed, cache = self.model.draft(params, sampling, target, cache, asked)
        return choose_rows(found, copied, proposed), (tables, cache)

    def learn(
        self,
        before: DecodeState,
        after: DecodeState,
        draft: Draft,
        state: tuple[NgramState, KVCache],
    ) -> tuple[NgramState, KVCache]:
        """Both learn; of a copied draft nothing is in the model's cache."""
        tables, cache = state
        own = dataclasses.replace(draft, count=jnp.where(draft.drafter == 1, draft.count, 0))
        return (
            self.ngram.learn(before, after, draft, tables),
            self.model.learn(before, after, own, cache),
        )
