"""Speculative decoding: draft, verify, emit, the whole loop on one device.

One round: the drafter proposes up to draft_len tokens; the target scores the text's last token and
the draft in one pass; verification keeps a prefix and adds one token of the target's. Both caches
are rewound by setting lengths: what was rejected is overwritten later.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ssd_jax.config import ModelConfig
from ssd_jax.control_flow import run_if
from ssd_jax.decoding.autoregressive import decode_step
from ssd_jax.decoding.emission import emit, record_logprobs, write_where
from ssd_jax.decoding.finish import Finish
from ssd_jax.drafting.drafter import Drafter
from ssd_jax.drafting.pace import draft_limits, update_pace
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
    jax.jit,
    static_argnames=("config", "drafter", "verification", "widths"),
    donate_argnames="state",
)
def decode_speculative(
    config: ModelConfig,
    params: ModelParams,
    drafter: Drafter,
    drafter_params: PyTree,
    sampling: Sampling,
    state: SpeculativeState,
    num_rounds: Int[Array, ""],
    round_s: Float[Array, "P _"] | None = None,
    synthetic_acceptance: Float[Array, ""] | None = None,
    *,
    verification: Verification,
    widths: tuple[int, ...],
) -> SpeculativeState:
    """The state after `num_rounds` more rounds, or as soon as no row is running.

    Exactness: greedy rows emit the target's own tokens; sampled rows the tokens of autoregressive
    decoding with the same seed (coupled) or of the same distribution (rejection).

    Args:
        config: of the target.
        params: of the target.
        drafter: who proposes tokens.
        drafter_params: its weights.
        sampling: options of every row.
        state: where to go on from.
        num_rounds: most rounds to run.
        round_s: seconds of a round by drafter and draft length, by which each row's draft length is
            chosen anew before every round; None drafts as much as there is room for.
        synthetic_acceptance: accept drafted tokens with this probability whatever they are. The
            output is then not the target's.
        verification: the rule by which drafted tokens stand.
        widths: tokens in a pass of the target, ascending: each round takes the smallest that holds
            its longest draft and the token before it.
    """

    def unfinished(carry: tuple[Array, SpeculativeState]) -> Array:
        count, state = carry
        return (count < num_rounds) & jnp.any(state.target.finish == Finish.RUNNING)

    def advance(carry: tuple[Array, SpeculativeState]) -> tuple[Array, SpeculativeState]:
        count, state = carry
        before, pace = state.target, state.pace
        running = before.finish == Finish.RUNNING
        room = draft_room(sampling, before, drafter.draft_len)
        limits = jnp.broadcast_to(room, (len(drafter.names), *room.shape))
        if pace is not None and round_s is not None:
            limits = jnp.minimum(limits, draft_limits(pace, round_s))
        draft, memory = drafter.draft(drafter_params, sampling, before, state.drafter, limits)

        def run(
            width: int, state: tuple[DecodeState, Int[Array, "B"]]
        ) -> tuple[DecodeState, Int[Array, "B"]]:
            if width == 1:
                return decode_step(config, params, sampling, state[0]), state[1]
            after, verdict = verify_round(
                config,
                params,
                sampling,
                state[0],
                cut_draft(draft, width - 1),
                synthetic_acceptance,
                verification,
            )
            return after, verdict.num_accepted

        outcome = before, jnp.zeros_like(draft.count)
        if len(widths) == 1:
            after, num_accepted = run(widths[0], outcome)
        else:
            needed = jnp.max(jnp.where(running, draft.count, 0)) + 1
            smallest = jnp.sum(jnp.array(widths[:-1], jnp.int32) < needed)
            for index, width in enumerate(widths):
                outcome = run_if(smallest == index, functools.partial(run, width), outcome)
            after, num_accepted = outcome
        return count + 1, SpeculativeState(
            target=after,
            drafter=drafter.learn(before, after, draft, memory),
            stats=add_round(state.stats, draft, num_accepted, running, before),
            pace=None if pace is None else update_pace(pace, draft, num_accepted, running),
        )

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))[1]


def verify_widths(draft_len: int, *, may_decline: bool) -> tuple[int, ...]:
    """Pass widths that the loop chooses from; few, since each is a program of its own.

    Drafts of one known length need one width. Others need a plain step for rounds without a draft,
    and a few steps up to the longest draft.
    """
    if not may_decline:
        return (draft_len + 1,)
    return (*(width for width in (1, 4, 8, 16) if width <= draft_len), draft_len + 1)


def draft_room(sampling: Sampling, target: DecodeState, draft_len: int) -> Int[Array, "B"]:
    """Most tokens to draft for each row: what fits before its limit together with the bonus token.

    Nothing for rows that have ended.
    """
    room = jnp.clip(sampling.max_length - target.lengths - 1, 0, draft_len)
    return jnp.where(target.finish == Finish.RUNNING, room, 0).astype(jnp.int32)


def cut_draft(draft: Draft, draft_len: int) -> Draft:
    """The draft's first `draft_len` positions, which are all that any row uses."""
    law = None if draft.law is None else draft.law[:, :draft_len]
    return dataclasses.replace(draft, tokens=draft.tokens[:, :draft_len], law=law)


def verify_round(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    before: DecodeState,
    draft: Draft,
    synthetic_acceptance: Float[Array, ""] | None,
    verification: Verification,
) -> tuple[DecodeState, Verdict]:
    """The text after the target verified a draft, its accepted part and the bonus token emitted."""
    last = before.lengths - 1
    last_token = jnp.take_along_axis(before.tokens, last[:, None], axis=1)
    inputs = jnp.concatenate([last_token, draft.tokens], axis=1)
    hidden, cache = forward(config, params, inputs, before.cache, last)
    logits = compute_logits(params, hidden)
    counts = counts_along_draft(before.output_counts, draft.tokens)
    laws = over_positions(warp, logits, counts, sampling=sampling)
    verdict = verify(verification, draft, laws, sampling, before.lengths, synthetic_acceptance)
    candidates = verified_tokens(draft, verdict)
    logprobs = before.logprobs
    if logprobs is not None:
        shown = over_positions(reported_logprobs, logits, counts, sampling=sampling)
        logprobs = record_logprobs(logprobs, shown, candidates, before.lengths)
    target = dataclasses.replace(before, cache=cache, logprobs=logprobs)
    target = emit(target, sampling, candidates, verdict.num_accepted + 1)
    return target, verdict


def verified_tokens(draft: Draft, verdict: Verdict) -> Int[Array, "B T"]:
    """The accepted tokens of each row, then its bonus token (which also fills what is left)."""
    offsets = jnp.arange(draft.tokens.shape[1] + 1, dtype=jnp.int32)
    padded = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    accepted = offsets < verdict.num_accepted[:, None]
    return jnp.where(accepted, padded, verdict.bonus_token[:, None])


def add_round(
    stats: SpeculationStats,
    draft: Draft,
    num_accepted: Int[Array, "B"],
    running: Bool[Array, "B"],
    before: DecodeState,
) -> SpeculationStats:
    """The log with one more round of the running rows, which began with the text `before`."""
    entry = jnp.stack([draft.drafter + 1, draft.count, num_accepted], axis=-1).astype(jnp.int8)
    rounds = write_where(stats.rounds, before.lengths, running[:, None], entry[:, None])
    return SpeculationStats(rounds=rounds)
