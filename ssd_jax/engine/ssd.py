"""Speculative speculative decoding as the host sees it: dispatching its rounds."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from ssd_jax.decoding.emission import stop_rows
from ssd_jax.decoding.ssd import (
    NOTHING_JUDGED,
    Speculator,
    prepare,
    propose,
    verify_draft,
)
from ssd_jax.drafting.drafts import point_masses
from ssd_jax.engine.batch import Batch
from ssd_jax.engine.method import Method, no_stats
from ssd_jax.engine.prompts import learn_prompts, read_prompts
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import DeviceError, RequestError
from ssd_jax.model import Model
from ssd_jax.placement import home
from ssd_jax.speculation_cache import no_prepared_drafts
from ssd_jax.types import DecodeState, LookupStats, Sampling, SpeculationStats, SpeculatorState

type Program = Literal["propose", "verify", "prepare"]
type Watch = Callable[[Program, jax.Array], None]


@struct.dataclass
class Run:
    """A batch in the middle of SSD: both devices' states, and the outcome on its way.

    `last_outcome` is the one before, by which the host notices, a round late, that all rows ended.
    """

    target: DecodeState
    stats: SpeculationStats
    target_sampling: Sampling
    speculator: SpeculatorState
    draft_sampling: Sampling
    outcome: Int[Array, "B 3"]
    last_outcome: Int[Array, "B 3"] | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What all rounds of a decoding have in common: both models, and how they work together."""

    target: Model
    draft: Model
    speculator: Speculator
    target_home: Sharding
    draft_home: Sharding
    synthetic_acceptance: Float[Array, ""] | None
    synthetic_hit_rate: Float[Array, ""] | None


def speculative_speculative(model: Model, ssd: SSD) -> Method:
    """Rounds dispatched one after the other, none of them waited for.

    Raises:
        RequestError: more guesses than there are tokens.
    """
    programs = open_programs(model, ssd)

    def advance(batch: Batch, run: Run, rounds: int) -> Run:
        with _naming("A program of the target or the draft"):
            for _ in range(rounds):
                if has_ended(run):
                    break
                run = play_round(programs, run)
            # Whatever fails on a device is noticed here, not where the caller reads the text.
            jax.block_until_ready((run.target.tokens, run.speculator.stats))
        return run

    def stop(run: Run, rows: np.ndarray) -> Run:
        text = stop_rows(run.speculator.text, jax.device_put(rows, programs.draft_home))
        return dataclasses.replace(
            run,
            target=stop_rows(run.target, jax.device_put(rows, programs.target_home)),
            speculator=dataclasses.replace(run.speculator, text=text),
        )

    return Method(
        prefill=functools.partial(begin, programs),
        advance=advance,
        view=lambda run: (run.target, run.stats, run.speculator.stats),
        stop=stop,
    )


def open_programs(model: Model, ssd: SSD) -> Programs:
    """What the rounds of this target with these options have in common.

    Raises:
        RequestError: more guesses than there are tokens.
    """
    speculator = ssd.speculator
    if speculator.fan_out.most_guesses > model.config.vocab_size:
        raise RequestError(
            f"A fan-out guesses at most as many tokens as the vocabulary has "
            f"({model.config.vocab_size}), got {speculator.fan_out.most_guesses}: lower it."
        )

    def placed(rate: float | None, where: Sharding) -> Array | None:
        return None if rate is None else jax.device_put(np.float32(rate), where)

    return Programs(
        target=model,
        draft=ssd.draft,
        speculator=speculator,
        target_home=home(model),
        draft_home=home(ssd.draft),
        synthetic_acceptance=placed(ssd.synthetic_acceptance, home(model)),
        synthetic_hit_rate=placed(ssd.synthetic_hit_rate, home(ssd.draft)),
    )


def begin(programs: Programs, batch: Batch) -> Run:
    """The prompts read by both models, and nothing prepared."""
    target_home, draft_home = programs.target_home, programs.draft_home
    return Run(
        target=read_prompts(programs.target, batch),
        stats=jax.device_put(no_stats(batch), target_home),
        target_sampling=jax.device_put(batch.sampling, target_home),
        speculator=jax.device_put(_open_speculator(programs, batch), draft_home),
        draft_sampling=jax.device_put(batch.sampling, draft_home),
        outcome=jax.device_put(_opening(batch), draft_home),
        last_outcome=None,
    )


def has_ended(run: Run) -> bool:
    """Whether all rows had ended a round ago, which is as much as the host can know in time."""
    return run.last_outcome is not None and bool(np.all(jax.device_get(run.last_outcome)[:, 2]))


def play_round(programs: Programs, run: Run, watch: Watch | None = None) -> Run:
    """One more round, dispatched and not waited for.

    `watch` is handed each result as soon as its program is dispatched: the draft, the outcome, and
    the prepared bonus tokens (which the next round gives away).
    """
    watch = watch or _ignore
    speculator, draft = programs.speculator, programs.draft
    with _naming("The draft's program (propose)"):
        state, message, law = propose(
            speculator,
            draft.params,
            run.draft_sampling,
            run.speculator,
            run.outcome,
            programs.synthetic_hit_rate,
        )
        watch("propose", message)
    message, law = jax.device_put((message, law), programs.target_home)
    target, stats, outcome = verify_draft(
        programs.target.config,
        programs.target.params,
        run.target_sampling,
        run.target,
        run.stats,
        message,
        law,
        programs.synthetic_acceptance,
        verification=speculator.verification,
    )
    watch("verify", outcome)
    with _naming("The draft's program (prepare)"):
        state = prepare(speculator, draft.params, run.draft_sampling, state)
        watch("prepare", state.prepared.bonus_token)
    return dataclasses.replace(
        run,
        target=target,
        stats=stats,
        speculator=state,
        outcome=jax.device_put(outcome, programs.draft_home),
        last_outcome=run.outcome,
    )


def _ignore(program: Program, result: jax.Array) -> None:
    """Watch nothing."""


@contextlib.contextmanager
def _naming(program: str) -> Iterator[None]:
    """Failures of the device inside are told as those of this program."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError(
            f"{program} should have run to its end, but its device reported: {error}. Start the "
            "request again, with the draft on another device or without speculation if it recurs."
        ) from error


def _opening(batch: Batch) -> np.ndarray:
    """An outcome that emits nothing, from which the first round starts."""
    outcome = np.zeros((len(batch.lengths), 3), np.int32)
    outcome[:, 0] = NOTHING_JUDGED
    return outcome


def _open_speculator(programs: Programs, batch: Batch) -> SpeculatorState:
    """The draft device's state with the prompts read and nothing prepared."""
    speculator, vocab_size = programs.speculator, programs.target.config.vocab_size
    num_rows, draft_len, num_branches = (
        len(batch.lengths),
        speculator.draft_len,
        speculator.num_branches,
    )
    with_law = speculator.verification == "rejection"
    nothing = point_masses(
        jnp.zeros((num_rows, draft_len), jnp.int32), jnp.zeros(num_rows, jnp.int32)
    )
    if with_law:
        law = jnp.zeros((num_rows, draft_len, vocab_size), jnp.float32)
        nothing = dataclasses.replace(nothing, law=law)
    return SpeculatorState(
        text=dataclasses.replace(
            read_prompts(programs.draft, batch),
            output_counts=jnp.zeros((num_rows, vocab_size), jnp.int32),
            logprobs=None,
        ),
        prepared=no_prepared_drafts(
            num_rows, num_branches, draft_len, vocab_size, with_law=with_law
        ),
        draft=nothing,
        was_hit=jnp.zeros(num_rows, bool),
        tables=None if speculator.ngram is None else learn_prompts(speculator.ngram, batch),
        stats=LookupStats(found=jnp.zeros(batch.tokens.shape, jnp.int32)),
    )
