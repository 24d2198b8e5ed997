"""Speculative decoding: draft, verify, emit, the whole loop on one device.

One round: the drafter proposes up to draft_len tokens; the target scores the text's last token and
the whole draft in one pass of draft_len + 1 tokens; verification keeps a prefix and adds one token
of the target's. Both caches are rewound by setting lengths: what was rejected is overwritten
later.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ssd_jax.config import ModelConfig
from ssd_jax.decoding.autoregressive import decode_step
from ssd_jax.decoding.emission import emit, record_logprobs
from ssd_jax.decoding.finish import Finish
from ssd_jax.drafting.drafter import Drafter
from ssd_jax.models.decoder import compute_logits, forward
from ssd_jax.sampling import counts_along_draft, over_positions, reported_logprobs, warp
from ssd_jax.types import (
    DecodeState,
    Draft,
    ModelParams,
    Sampling,
    SpeculationStats,
    SpeculativeState,
    Verdict,
)
from ssd_jax.verification import Verification, verify


@functools.partial(
    jax.jit, static_argnames=("config", "drafter", "verification"), donate_argnames="state"
)
def decode_speculative(
    config: ModelConfig,
    params: ModelParams,
    drafter: Drafter,
    drafter_params: PyTree,
    sampling: Sampling,
    state: SpeculativeState,
    num_rounds: Int[Array, ""],
    *,
    verification: Verification,
) -> SpeculativeState:
    """The state after `num_rounds` more rounds, or as soon as no row is running.

    Exactness: greedy rows emit the target's own tokens; sampled rows the tokens of autoregressive
    decoding with the same seed (coupled) or of the same distribution (rejection).
    """

    def unfinished(carry: tuple[Array, SpeculativeState]) -> Array:
        count, state = carry
        return (count < num_rounds) & jnp.any(state.target.finish == Finish.RUNNING)

    def advance(carry: tuple[Array, SpeculativeState]) -> tuple[Array, SpeculativeState]:
        count, state = carry
        before = state.target
        draft, memory = drafter.draft(drafter_params, sampling, before, state.drafter)

        def verified() -> tuple[DecodeState, SpeculationStats]:
            return verify_round(config, params, sampling, before, state.stats, draft, verification)

        def plain() -> tuple[DecodeState, SpeculationStats]:
            return decode_step(config, params, sampling, before), add_step(state.stats, before)

        if drafter.may_decline:
            after, stats = jax.lax.cond(jnp.any(draft.count > 0), verified, plain)
        else:
            after, stats = verified()
        memory = drafter.learn(before, after, memory)
        return count + 1, SpeculativeState(target=after, drafter=memory, stats=stats)

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))[1]


def verify_round(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    before: DecodeState,
    stats: SpeculationStats,
    draft: Draft,
    verification: Verification,
) -> tuple[DecodeState, SpeculationStats]:
    """The text after the target verified a draft: its accepted part and the bonus token emitted."""
    last = before.lengths - 1
    last_token = jnp.take_along_axis(before.tokens, last[:, None], axis=1)
    inputs = jnp.concatenate([last_token, draft.tokens], axis=1)
    hidden, cache = forward(config, params, inputs, before.cache, last)
    logits = compute_logits(params, hidden)
    counts = counts_along_draft(before.output_counts, draft.tokens)
    laws = over_positions(warp, logits, counts, sampling=sampling)
    verdict = verify(verification, draft, laws, sampling, before.lengths)
    offsets = jnp.arange(inputs.shape[1], dtype=jnp.int32)
    padded = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    accepted = offsets < verdict.num_accepted[:, None]
    candidates = jnp.where(accepted, padded, verdict.bonus_token[:, None])
    logprobs = before.logprobs
    if logprobs is not None:
        shown = over_positions(reported_logprobs, logits, counts, sampling=sampling)
        logprobs = record_logprobs(logprobs, shown, candidates, before.lengths)
    target = dataclasses.replace(before, cache=cache, logprobs=logprobs)
    target = emit(target, sampling, candidates, verdict.num_accepted + 1)
    running = before.finish == Finish.RUNNING
    num_emitted = target.lengths - before.lengths
    return target, add_round(stats, draft, verdict, running, num_emitted)


def add_round(
    stats: SpeculationStats,
    draft: Draft,
    verdict: Verdict,
    running: Array,
    num_emitted: Int[Array, "B"],
) -> SpeculationStats:
    """The statistics with one more round of the running rows; only emitted tokens count."""
    ran = running.astype(jnp.int32)
    accepted = jnp.minimum(verdict.num_accepted, num_emitted) * ran
    offsets = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)
    return SpeculationStats(
        target_steps=stats.target_steps + ran,
        drafted=stats.drafted + draft.count * ran,
        accepted=stats.accepted + accepted,
        accepted_at=stats.accepted_at + (offsets < accepted[:, None]).astype(jnp.int32),
    )


def add_step(stats: SpeculationStats, before: DecodeState) -> SpeculationStats:
    """The statistics with one plain step of the running rows, for which nothing was drafted."""
    ran = (before.finish == Finish.RUNNING).astype(jnp.int32)
    return dataclasses.replace(stats, target_steps=stats.target_steps + ran)
