"""The speculation cache: guessing outcomes of a verification, and finding the true one."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ssd_jax.fan_out import FanOut, branch_layout
from ssd_jax.sampling import Purpose, gumbel_noise, penalize, position_key, warp
from ssd_jax.types import Draft, PreparedDrafts, Sampling, Verdict

NO_OUTCOME = -2


def no_prepared_drafts(
    batch_size: int, num_branches: int, draft_len: int, vocab_size: int, *, with_law: bool
) -> PreparedDrafts:
    """A cache in which nothing is found."""
    shape = (batch_size, num_branches)
    law = None
    if with_law:
        law = jnp.zeros((*shape, draft_len, vocab_size), jnp.float32)
    return PreparedDrafts(
        num_accepted=jnp.full(shape, NO_OUTCOME, jnp.int32),
        bonus_token=jnp.zeros(shape, jnp.int32),
        tokens=jnp.zeros((*shape, draft_len), jnp.int32),
        law=law,
    )


def look_up(
    prepared: PreparedDrafts, verdict: Verdict
) -> tuple[Bool[Array, "B"], Int[Array, "B"], Int[Array, "B J"], Float[Array, "B J V"] | None]:
    """Whether each row's outcome was prepared, its branch, the draft there and the draft's law."""
    same = (prepared.num_accepted == verdict.num_accepted[:, None]) & (
        prepared.bonus_token == verdict.bonus_token[:, None]
    )
    branch = jnp.argmax(same, axis=1).astype(jnp.int32)
    rows = jnp.arange(len(branch), dtype=jnp.int32)
    law = None if prepared.law is None else prepared.law[rows, branch]
    return jnp.any(same, axis=1), branch, prepared.tokens[rows, branch], law


def look_up_synthetic(
    prepared: PreparedDrafts,
    verdict: Verdict,
    sampling: Sampling,
    positions: Int[Array, "B"],
    hit_rate: Float[Array, ""],
) -> tuple[Bool[Array, "B"], Int[Array, "B"], Int[Array, "B J"], Float[Array, "B J V"] | None]:
    """`look_up` in which an outcome counts as prepared with probability `hit_rate`, by chance.

    For measuring what rounds cost apart from how well two models agree. The draft is one that was
    prepared for as many accepted tokens; where there is none, nothing is found.
    """
    same = prepared.num_accepted == verdict.num_accepted[:, None]
    branch = jnp.argmax(same, axis=1).astype(jnp.int32)
    rows = jnp.arange(len(branch), dtype=jnp.int32)

    def draw(seed: Array, position: Array) -> Array:
        return jax.random.uniform(position_key(seed, position, Purpose.HIT))

    hit = jnp.any(same, axis=1) & (jax.vmap(draw)(sampling.seed, positions) < hit_rate)
    law = None if prepared.law is None else prepared.law[rows, branch]
    return hit, branch, prepared.tokens[rows, branch], law


def guess_outcomes(
    fan_out: FanOut,
    num_branches: int,
    scores: Float[Array, "B J+1 V"],
    draft: Draft,
    after_hit: Bool[Array, "B"],
) -> tuple[Int[Array, "B R"], Int[Array, "B R"]]:
    """The outcomes to prepare for: accepted tokens (or NO_OUTCOME) and bonus token of each branch.

    `scores[b, j]` ranks the tokens that may follow j accepted ones. The drafted token itself cannot
    follow there (it would have been accepted), except after the whole draft.
    """
    offsets = jnp.arange(scores.shape[1], dtype=jnp.int32)
    padded = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    vocabulary = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    impossible = (offsets < draft.count[:, None])[..., None] & (vocabulary == padded[..., None])
    _, guesses = jax.lax.top_k(jnp.where(impossible, -jnp.inf, scores), fan_out.most_guesses)
    hit_layout = branch_layout(fan_out.after_hit, num_branches)
    miss_layout = branch_layout(fan_out.after_miss, num_branches)
    depth, rank = (
        jnp.where(after_hit[:, None], jnp.asarray(hit), jnp.asarray(miss))
        for hit, miss in zip(hit_layout, miss_layout, strict=True)
    )
    rows = np.arange(scores.shape[0], dtype=np.int32)[:, None]
    bonus_token = guesses[rows, jnp.maximum(depth, 0), rank].astype(jnp.int32)
    return depth, bonus_token


def guess_scores(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    output_counts: Int[Array, "B V"],
    positions: Int[Array, "B"],
) -> Float[Array, "B V"]:
    """How likely the target is to choose each token, by the draft's logits.

    Sampled rows add the noise that the target will choose with (it is keyed by the position), which
    makes the guess far better than the law alone. That leaves exactness alone: guesses decide what
    is prepared, never what a prepared draft says.
    """
    greedy = sampling.temperature == 0

    def with_noise() -> Float[Array, "B V"]:
        law = warp(logits, sampling, output_counts)
        noise = gumbel_noise(sampling.seed, positions, Purpose.TOKEN, law.shape[-1])
        return jnp.where(greedy[:, None], penalize(logits, sampling, output_counts), law + noise)

    return jax.lax.cond(
        jnp.all(greedy), lambda: penalize(logits, sampling, output_counts), with_noise
    )


def favour_misses(
    law: Float[Array, "B V"],
    counts: tuple[int, ...],
    position: Int[Array, ""],
    weight: float,
    sampling: Sampling,
) -> Float[Array, "B V"]:
    """The law with its most likely tokens scaled by `weight` (Saguaro sampling, Definition 14).

    The tokens that a rejection is likely to emit instead are those that the draft avoided: drawing
    them less often makes the guesses, which are the same tokens, come true more often. At this
    draft position `counts[position]` of them are guessed besides the drafted one. Greedy rows, and
    laws with nothing outside that set, stay as they are. The result is normalised and is the law to
    verify with.
    """
    most = min(max(counts) + 1, law.shape[-1])
    descending, _ = jax.lax.top_k(law, most)
    last = jnp.minimum(jnp.asarray(counts, jnp.int32)[position], most - 1)
    threshold = jax.lax.dynamic_index_in_dim(descending, last, axis=1)
    scaled = jnp.where(law >= threshold, law + jnp.log(jnp.float32(weight)), law)
    total = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    usable = (total > -jnp.inf) & (sampling.temperature > 0)[:, None]
    return jnp.where(usable, scaled - jnp.where(usable, total, 0.0), law)
