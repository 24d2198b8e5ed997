"""Deciding which drafted tokens stand, and the one token the target adds.

`laws[b, j]` is the target's warped law (log-probabilities) for the token after j drafted ones, so
it has one position more than the draft. Where the target has no law, no drafted token stands and
the bonus token is NO_TOKEN. `positions[b]` is the absolute position of the first drafted token.
Called p and q here: the target's law and the law the draft was drawn from.

Source: Leviathan et al. 2023 and Chen et al. 2023 (rejection), Daliri et al. 2024 (coupled).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssd_jax.sampling import (
    Purpose,
    first_argmax,
    over_positions,
    position_key,
    sample_tokens,
)
from ssd_jax.types import Draft, Sampling, Verdict

Verification = Literal["coupled", "rejection", "greedy"]


def verify(
    verification: Verification,
    draft: Draft,
    laws: Float[Array, "B J+1 V"],
    sampling: Sampling,
    positions: Int[Array, "B"],
    synthetic_acceptance: Float[Array, ""] | None = None,
) -> Verdict:
    """The verdict by the chosen rule; for greedy rows all rules accept the target's own tokens.

    With a synthetic acceptance, drafted tokens stand or fall by chance instead.
    """
    if synthetic_acceptance is not None:
        return verify_synthetic(draft, laws, sampling, positions, synthetic_acceptance)
    match verification:
        case "coupled":
            return verify_coupled(draft, laws, sampling, positions)
        case "rejection":
            return verify_rejection(draft, laws, sampling, positions)
        case "greedy":
            return verify_greedy(draft, laws)


def verify_greedy(draft: Draft, laws: Float[Array, "B J+1 V"]) -> Verdict:
    """Accept drafted tokens while they are the target's most likely ones; draws no random numbers.

    Exactness: for greedy rows only; the caller refuses others.
    """
    return _match(draft, first_argmax(laws))


def verify_coupled(
    draft: Draft,
    laws: Float[Array, "B J+1 V"],
    sampling: Sampling,
    positions: Int[Array, "B"],
) -> Verdict:
    """Accept drafted tokens while they are what the target samples with its own position's noise.

    Exactness: the emitted tokens are those of autoregressive sampling with the same seed, whatever
    was drafted. Needs no law from the draft.
    """
    offsets = jnp.arange(laws.shape[1], dtype=positions.dtype)
    own = over_positions(sample_tokens, laws, positions[:, None] + offsets, sampling=sampling)
    return _match(draft, own)


def verify_rejection(
    draft: Draft,
    laws: Float[Array, "B J+1 V"],
    sampling: Sampling,
    positions: Int[Array, "B"],
) -> Verdict:
    """Accept token s with probability min(1, p(s) / q(s)), else draw from max(p - q, 0).

    Without a law the drafted tokens are point masses: s is accepted with probability p(s), and a
    rejection draws from p without s.
    Exactness: the emitted tokens follow the target's law for any draft. The test u q(s) < p(s) is
    strict, so a token of probability zero is never accepted. Where nothing was drafted the bonus
    token is that of a plain step, so that it does not matter which of the two a round takes.
    """
    offsets = jnp.arange(draft.tokens.shape[1], dtype=positions.dtype)
    chosen = draft.tokens[..., None]
    p_chosen = jnp.exp(jnp.take_along_axis(laws[:, :-1], chosen, axis=-1)[..., 0])
    q_chosen = jnp.ones_like(p_chosen)
    if draft.law is not None:
        q_chosen = jnp.exp(jnp.take_along_axis(draft.law, chosen, axis=-1)[..., 0])
    uniform = _uniforms(sampling, positions[:, None] + offsets)
    num_accepted = _leading(draft, uniform * q_chosen < p_chosen)
    last = num_accepted[:, None, None]
    law = jnp.take_along_axis(laws, last, axis=1)[:, 0]
    rejected_at = jnp.minimum(last, draft.tokens.shape[1] - 1)
    rejected = jnp.take_along_axis(draft.tokens, rejected_at[..., 0], axis=1)
    if draft.law is None:
        vocabulary = jnp.arange(law.shape[-1], dtype=rejected.dtype)
        q = (vocabulary == rejected).astype(law.dtype)
    else:
        q = jnp.exp(jnp.take_along_axis(draft.law, rejected_at, axis=1)[:, 0])
    residual = jnp.log(jnp.maximum(jnp.exp(law) - q, 0.0))
    was_rejected = num_accepted < draft.count
    # Where rounding leaves no residual at all, p and q are equal and p itself is right.
    use_residual = was_rejected & jnp.any(residual > -jnp.inf, axis=-1)
    law = jnp.where(use_residual[:, None], residual, law)
    bonus_token = sample_tokens(law, sampling, positions + num_accepted)
    return Verdict(num_accepted=num_accepted, bonus_token=bonus_token)


def verify_synthetic(
    draft: Draft,
    laws: Float[Array, "B J+1 V"],
    sampling: Sampling,
    positions: Int[Array, "B"],
    acceptance: Float[Array, ""],
) -> Verdict:
    """Accept each token in front of the first rejected one with probability `acceptance`.

    For measuring what rounds cost apart from how well two models agree: the output is not the
    target's. The bonus token is the target's choice.
    """
    offsets = jnp.arange(draft.tokens.shape[1], dtype=positions.dtype)
    uniform = _uniforms(sampling, positions[:, None] + offsets)
    num_accepted = _leading(draft, uniform < acceptance)
    law = jnp.take_along_axis(laws, num_accepted[:, None, None], axis=1)[:, 0]
    bonus_token = sample_tokens(law, sampling, positions + num_accepted)
    return Verdict(num_accepted=num_accepted, bonus_token=bonus_token)


def _match(draft: Draft, own: Int[Array, "B J+1"]) -> Verdict:
    """The verdict that keeps drafted tokens while they are the target's own."""
    num_accepted = _leading(draft, draft.tokens == own[:, :-1])
    bonus_token = jnp.take_along_axis(own, num_accepted[:, None], axis=1)[:, 0]
    return Verdict(num_accepted=num_accepted, bonus_token=bonus_token)


def _leading(draft: Draft, stands: Bool[Array, "B J"]) -> Int[Array, "B"]:
    """How many drafted tokens of each row stand before the first that does not."""
    drafted = jnp.arange(stands.shape[1], dtype=draft.count.dtype) < draft.count[:, None]
    return jnp.sum(jnp.cumprod((stands & drafted).astype(jnp.int32), axis=1), axis=1)


def _uniforms(sampling: Sampling, positions: Int[Array, "B J"]) -> Float[Array, "B J"]:
    """A uniform number in [0, 1) for each position of each row."""

    def draw(seed: Array, position: Array) -> Array:
        return jax.random.uniform(position_key(seed, position, Purpose.ACCEPT))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(sampling.seed, positions)
