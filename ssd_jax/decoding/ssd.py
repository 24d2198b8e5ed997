"""Speculative speculative decoding: the next draft is prepared while the last one is verified.

One round is three programs, of which the last two run at the same time where target and draft have
devices of their own:

    propose  draft device    the outcome of the last verification enters the text; the draft for it
                             is looked up, or made afresh where it was not prepared
    verify   target device   the draft is judged: an outcome
    prepare  draft device    the likely outcomes are guessed, and a draft is made after each

All that travels is a draft (draft_len + 2 numbers a row) and an outcome (3 numbers a row); under
rejection the draft's law as well. The text is kept on both devices, and both grow it by the same
rule.

Source: Kumar, Dao, May 2026 (Saguaro), Algorithm 1. A row's N below is its text's length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ssd_jax.config import ModelConfig
from ssd_jax.control_flow import run_if
from ssd_jax.decoding.emission import emit, write_where
from ssd_jax.decoding.finish import Finish
from ssd_jax.decoding.speculative import add_round, draft_room, verified_tokens, verify_round
from ssd_jax.drafting.draft_model import draft_tokens, match_vocabulary, within_context
from ssd_jax.drafting.drafts import choose_rows, cut_at_failure, point_masses
from ssd_jax.drafting.ngram import NgramConfig, draft_ngram, update_ngram
from ssd_jax.fan_out import FanOut
from ssd_jax.models.branches import forward_branches, init_branches
from ssd_jax.models.decoder import compute_logits, forward
from ssd_jax.sampling import Purpose, counts_along_draft, over_positions, sample_tokens, warp
from ssd_jax.speculation_cache import (
    favour_misses,
    guess_outcomes,
    guess_scores,
    look_up,
    look_up_synthetic,
)
from ssd_jax.types import (
    BranchCache,
    DecodeState,
    Draft,
    LookupStats,
    ModelParams,
    PreparedDrafts,
    Sampling,
    SpeculationStats,
    SpeculatorState,
    Verdict,
)
from ssd_jax.verification import Verification

NOTHING_JUDGED = -1  # num_accepted of the outcome that opens a decoding: no token is emitted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speculator:
    """How drafts are made and prepared (a static argument of the programs).

    `ngram` drafts at once where an outcome was not prepared; without it the draft model does, while
    the target waits. `miss_weight` is the C of Saguaro sampling, 1 for ordinary sampling.
    `mesh` holds several draft devices over which the branches are divided, each with whole weights.
    """

    config: ModelConfig
    draft_len: int
    fan_out: FanOut
    verification: Verification
    ngram: NgramConfig | None
    miss_weight: float
    mesh: Mesh | None = None

    @property
    def num_branches(self) -> int:
        """Branches of a tree: the fan-out's, filled up to equal parts for the draft's devices."""
        parts = 1 if self.mesh is None else self.mesh.size
        return -(-self.fan_out.num_branches // parts) * parts


@functools.partial(jax.jit, static_argnames="speculator", donate_argnames="state")
def propose(
    speculator: Speculator,
    params: ModelParams,
    sampling: Sampling,
    state: SpeculatorState,
    outcome: Int[Array, "B 3"],
    synthetic_hit_rate: Float[Array, ""] | None = None,
) -> tuple[SpeculatorState, Int[Array, "B _"], Float[Array, "B J V"] | None]:
    """The draft for the outcome of the last one (tokens, count, whether prepared), and its law.

    With a synthetic hit rate, outcomes count as prepared by chance.
    """
    verdict = Verdict(num_accepted=outcome[:, 0], bonus_token=outcome[:, 1])
    before = state.text
    candidates = verified_tokens(state.draft, verdict)
    text = emit(before, sampling, candidates, verdict.num_accepted + 1)
    running = text.finish == Finish.RUNNING
    if synthetic_hit_rate is None:
        found, branch, tokens, law = look_up(state.prepared, verdict)
    else:
        found, branch, tokens, law = look_up_synthetic(
            state.prepared, verdict, sampling, text.lengths, synthetic_hit_rate
        )
    hit = found & running
    room = draft_room(sampling, text, speculator.draft_len)
    room = within_context(speculator.config, text.lengths, room)
    tables = state.tables
    if speculator.ngram is not None:
        tables = update_ngram(
            speculator.ngram,
            tables,
            text.tokens,
            before.lengths,
            text.lengths,
            width=speculator.draft_len + 1,
        )
    prepared = cut_at_failure(dataclasses.replace(point_masses(tokens, room), law=law))
    missing = jnp.where(hit, 0, room)

    def fall_back(both: tuple[Draft, DecodeState]) -> tuple[Draft, DecodeState]:
        return draft_afresh(speculator, params, sampling, both[1], tables, both[0], hit, missing)

    draft, text = run_if(jnp.any(missing > 0), fall_back, (prepared, text))
    state = dataclasses.replace(
        state,
        text=text,
        draft=draft,
        was_hit=hit,
        tables=tables,
        stats=LookupStats(
            found=write_where(state.stats.found, text.lengths, hit[:, None], branch[:, None] + 1)
        ),
    )
    message = [draft.tokens, draft.count[:, None], hit[:, None].astype(jnp.int32)]
    return state, jnp.concatenate(message, axis=1), draft.law


def draft_afresh(
    speculator: Speculator,
    params: ModelParams,
    sampling: Sampling,
    text: DecodeState,
    tables: PyTree,
    prepared: Draft,
    hit: Array,
    missing: Int[Array, "B"],
) -> tuple[Draft, DecodeState]:
    """The prepared drafts of the rows that have one, and fallback drafts for the others."""
    if speculator.ngram is not None:
        fresh = draft_ngram(speculator.ngram, tables, text.tokens, text.lengths)
        fresh = dataclasses.replace(fresh, count=jnp.minimum(fresh.count, missing))
    else:
        fresh, cache = draft_tokens(
            speculator.config,
            params,
            sampling,
            text,
            text.cache,
            missing,
            draft_len=speculator.draft_len,
            verification=speculator.verification,
            reshape_law=functools.partial(
                _reshape_law, speculator, sampling, speculator.fan_out.after_miss
            ),
        )
        text = dataclasses.replace(text, cache=cache)
    return choose_rows(hit, prepared, fresh), text


@functools.partial(
    jax.jit, static_argnames=("config", "verification"), donate_argnames=("state", "stats")
)
def verify_draft(
    config: ModelConfig,
    params: ModelParams,
    sampling: Sampling,
    state: DecodeState,
    stats: SpeculationStats,
    message: Int[Array, "B _"],
    law: Float[Array, "B J V"] | None,
    synthetic_acceptance: Float[Array, ""] | None = None,
    *,
    verification: Verification,
) -> tuple[DecodeState, SpeculationStats, Int[Array, "B 3"]]:
    """The text with what stands of a draft, and the outcome: accepted, bonus token, finish code."""
    drafter = 1 - message[:, -1]
    draft = Draft(tokens=message[:, :-2], count=message[:, -2], law=law, drafter=drafter)
    running = state.finish == Finish.RUNNING
    after, verdict = verify_round(
        config, params, sampling, state, draft, synthetic_acceptance, verification
    )
    stats = add_round(stats, draft, verdict.num_accepted, running, state)
    outcome = jnp.stack([verdict.num_accepted, verdict.bonus_token, after.finish], axis=1)
    return after, stats, outcome


@functools.partial(jax.jit, static_argnames="speculator", donate_argnames="state")
def prepare(
    speculator: Speculator, params: ModelParams, sampling: Sampling, state: SpeculatorState
) -> SpeculatorState:
    """The speculation cache for the draft that is being verified.

    First its trunk: the draft model reads the text's last token and the draft, so that slots N - 1
    to N + draft_len - 1 hold them and every outcome's continuation can be guessed. Then the tree:
    one branch for each guessed outcome (j, bonus token), which continues the trunk after j drafted
    tokens, at position N + j. All branches grow by a token a step.
    """
    config, text, draft = speculator.config, state.text, state.draft
    last = text.lengths - 1
    last_token = jnp.take_along_axis(text.tokens, last[:, None], axis=1)
    inputs = jnp.concatenate([last_token, draft.tokens], axis=1)
    hidden, trunk = forward(config, params, inputs, text.cache, last)
    vocab_size = text.output_counts.shape[-1]
    logits = match_vocabulary(compute_logits(params, hidden), vocab_size)
    counts = counts_along_draft(text.output_counts, draft.tokens)
    rejection = speculator.verification == "rejection"
    positions = text.lengths[:, None] + jnp.arange(inputs.shape[1], dtype=jnp.int32)
    scores = over_positions(guess_scores, logits, counts, positions, sampling=sampling)
    depth, bonus_token = guess_outcomes(
        speculator.fan_out, speculator.num_branches, scores, draft, state.was_hit
    )
    bonus_token = _divide(speculator, bonus_token, axis=1)
    grown = jnp.maximum(depth, 0)  # branches for no outcome grow as well, and are never found
    trunk_lengths = text.lengths[:, None] + grown
    rows = jnp.arange(len(last), dtype=jnp.int32)[:, None]
    branch_counts = _divide(speculator, add_token(counts[rows, grown], bonus_token), axis=1)

    def step(
        carry: tuple[Array, Array, BranchCache], index: Array
    ) -> tuple[tuple[Array, Array, BranchCache], tuple[Array, Array | None]]:
        tokens, counts, branches = carry
        hidden, branches = forward_branches(
            config, params, tokens, trunk, trunk_lengths, branches, index
        )
        logits = match_vocabulary(compute_logits(params, hidden), vocab_size)
        laws = over_positions(warp, logits, counts, sampling=sampling)
        if rejection:
            reshape = functools.partial(
                _reshape_law, speculator, sampling, speculator.fan_out.after_hit
            )
            laws = jax.vmap(reshape, in_axes=(1, None), out_axes=1)(laws, index)
        purpose = Purpose.DRAFT if rejection else Purpose.TOKEN
        choose = functools.partial(sample_tokens, purpose=purpose)
        tokens = over_positions(choose, laws, trunk_lengths + 1 + index, sampling=sampling)
        grown = jnp.maximum(tokens, 0)  # a branch that failed grows on, and is cut where it is used
        return (grown, add_token(counts, grown), branches), (tokens, laws if rejection else None)

    branches = init_branches(
        config, len(last), speculator.draft_len, speculator.num_branches, trunk.keys[0].dtype
    )
    branches = jax.tree.map(functools.partial(_divide, speculator, axis=3), branches)
    steps = jnp.arange(speculator.draft_len, dtype=jnp.int32)
    _, (tokens, laws) = jax.lax.scan(step, (bonus_token, branch_counts, branches), steps)
    prepared = PreparedDrafts(
        num_accepted=depth,
        bonus_token=bonus_token,
        tokens=jnp.moveaxis(tokens, 0, 2),
        law=None if laws is None else jnp.moveaxis(laws, 0, 2),
    )
    prepared = jax.tree.map(functools.partial(_divide, speculator, axis=None), prepared)
    return dataclasses.replace(
        state, text=dataclasses.replace(text, cache=trunk), prepared=prepared
    )


def add_token(counts: Int[Array, "B R V"], tokens: Int[Array, "B R"]) -> Int[Array, "B R V"]:
    """The counts with one more token in each branch."""
    rows = jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None]
    branches = jnp.arange(counts.shape[1], dtype=jnp.int32)
    return counts.at[rows, branches, tokens].add(1)


def _divide(speculator: Speculator, values: Array, *, axis: int | None) -> Array:
    """The values with an axis of branches divided over the draft's devices; None: whole on each."""
    if speculator.mesh is None:
        return values
    (name,) = speculator.mesh.axis_names
    spec = PartitionSpec(*(name if i == axis else None for i in range(values.ndim)))
    return jax.lax.with_sharding_constraint(values, NamedSharding(speculator.mesh, spec))


def _reshape_law(
    speculator: Speculator,
    sampling: Sampling,
    guesses: tuple[int, ...],
    law: Float[Array, "B V"],
    position: Int[Array, ""],
) -> Float[Array, "B V"]:
    """The law to draw a draft position from: reweighted where Saguaro sampling is on."""
    if speculator.miss_weight == 1 or speculator.verification != "rejection":
        return law
    return favour_misses(law, guesses, position, speculator.miss_weight, sampling)
