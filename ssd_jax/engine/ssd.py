"""Speculative speculative decoding as the host sees it: its options, and dispatching its rounds."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from ssd_jax.decoding.emission import stop_rows
from ssd_jax.decoding.ssd import (
    NOTHING_JUDGED,
    Fallback,
    Speculator,
    prepare,
    propose,
    verify_draft,
)
from ssd_jax.decoding.state import initial_state
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.batch import Batch
from ssd_jax.engine.method import Method, learn_prompts, no_stats, prefill_target, read_prompts
from ssd_jax.engine.speculation import check_draft_len, check_verification
from ssd_jax.errors import DeviceError, RequestError
from ssd_jax.fan_out import FanOut, uniform_fan_out
from ssd_jax.model import Model
from ssd_jax.placement import branch_mesh, home
from ssd_jax.speculation_cache import no_prepared_drafts
from ssd_jax.types import (
    DecodeState,
    Draft,
    LookupStats,
    Sampling,
    SpeculationStats,
    SpeculatorState,
)
from ssd_jax.verification import Verification

DEFAULT_DRAFT_LEN = 4
DEFAULT_GUESSES = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SSD:
    """Speculative speculative decoding: drafts are prepared while others are verified.

    Target and draft overlap where their weights lie on different devices (see `placement`).

    Attributes:
        draft: the model that proposes tokens; its vocabulary must be the target's.
        draft_len: most tokens in a draft, 1 to 64.
        fan_out: how many bonus tokens are guessed for 0, 1, ... draft_len accepted tokens: two
            lists, one list for both (after a hit and after a miss), or one number for all.
        fallback: who drafts where an outcome was not prepared: "neural" is the draft model while
            the target waits, "ngram" copies at once what followed the same tokens before.
        ngram: options of the n-gram fallback; `max_draft` is the draft_len here.
        verification: as in `Speculation`.
        miss_weight: the C of Saguaro sampling, 0 to 1, for verification "rejection": below 1 the
            draft avoids its likeliest tokens, so that rejections are guessed more often.
        synthetic_acceptance: as in `Speculation`.
    """

    draft: Model
    draft_len: int = DEFAULT_DRAFT_LEN
    fan_out: FanOut | tuple[int, ...] | int = DEFAULT_GUESSES
    fallback: Fallback = "neural"
    ngram: NgramConfig = dataclasses.field(default_factory=NgramConfig)
    verification: Verification = "coupled"
    miss_weight: float = 1.0
    synthetic_acceptance: float | None = None

    def __post_init__(self) -> None:
        check_draft_len(self.draft_len)
        check_verification(self.verification, self.synthetic_acceptance)
        if self.fallback not in ("neural", "ngram"):
            raise RequestError(f"fallback must be neural or ngram, got {self.fallback!r}.")
        if not 0 <= self.miss_weight <= 1:
            raise RequestError(f"miss_weight must be from 0 to 1, got {self.miss_weight!r}.")
        if self.miss_weight != 1 and self.verification != "rejection":
            raise RequestError(
                "miss_weight reweights the law that drafts are drawn from, which only verification "
                f"rejection knows, got {self.verification}: leave it at 1 or choose rejection."
            )
        fan_out = self.fan_out
        if isinstance(fan_out, int):
            fan_out = uniform_fan_out(self.draft_len, fan_out)
        if not isinstance(fan_out, FanOut):
            fan_out = FanOut(after_hit=tuple(fan_out), after_miss=tuple(fan_out))
        if len(fan_out.after_hit) != self.draft_len + 1:
            raise RequestError(
                f"A fan-out for draft_len {self.draft_len} has {self.draft_len + 1} numbers (for 0 "
                f"to {self.draft_len} accepted tokens), got {len(fan_out.after_hit)}."
            )
        object.__setattr__(self, "fan_out", fan_out)
        ngram = dataclasses.replace(self.ngram, max_draft=self.draft_len, min_draft=1)
        object.__setattr__(self, "ngram", ngram)

    @property
    def names(self) -> tuple[str, ...]:
        """Whose drafts are told apart."""
        return ("prepared", "fallback")

    @property
    def longest_draft(self) -> int:
        """Most tokens in a draft."""
        return self.draft_len

    @property
    def speculator(self) -> Speculator:
        """The options as the programs take them."""
        if not isinstance(self.fan_out, FanOut):
            raise TypeError("The fan-out is made a FanOut when the options are.")
        return Speculator(
            config=self.draft.config,
            draft_len=self.draft_len,
            fan_out=self.fan_out,
            verification=self.verification,
            fallback=self.fallback,
            ngram=self.ngram if self.fallback == "ngram" else None,
            miss_weight=float(self.miss_weight),
            mesh=branch_mesh(self.draft),
        )


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


def speculative_speculative(model: Model, ssd: SSD) -> Method:
    """Rounds dispatched one after the other, none of them waited for.

    Raises:
        RequestError: more guesses than there are tokens.
    """
    speculator, draft = ssd.speculator, ssd.draft
    if speculator.fan_out.most_guesses > model.config.vocab_size:
        raise RequestError(
            f"A fan-out guesses at most as many tokens as the vocabulary has "
            f"({model.config.vocab_size}), got {speculator.fan_out.most_guesses}: lower it."
        )
    target_home, draft_home = home(model), home(draft)
    rate = ssd.synthetic_acceptance
    acceptance = None if rate is None else jax.device_put(np.float32(rate), target_home)

    def prefill(batch: Batch) -> Run:
        num_rows = len(batch.lengths)
        return Run(
            target=prefill_target(model, batch),
            stats=jax.device_put(no_stats(num_rows, len(ssd.names), ssd.draft_len), target_home),
            target_sampling=jax.device_put(batch.sampling, target_home),
            speculator=jax.device_put(_read_prompts(model, ssd, batch), draft_home),
            draft_sampling=jax.device_put(batch.sampling, draft_home),
            outcome=jax.device_put(_opening(batch), draft_home),
            last_outcome=None,
        )

    def advance(batch: Batch, run: Run, rounds: int) -> Run:
        with _naming("A program of the target or the draft"):
            for _ in range(rounds):
                if run.last_outcome is not None and np.all(jax.device_get(run.last_outcome)[:, 2]):
                    break
                run = play_round(run)
            # Whatever fails on a device is noticed here, not where the caller reads the text.
            jax.block_until_ready((run.target.tokens, run.speculator.stats))
        return run

    def play_round(run: Run) -> Run:
        with _naming("The draft's program (propose)"):
            state, message, law = propose(
                speculator, draft.params, run.draft_sampling, run.speculator, run.outcome
            )
        message = jax.device_put(message, target_home)
        law = None if law is None else jax.device_put(law, target_home)
        target, stats, outcome = verify_draft(
            model.config,
            model.params,
            run.target_sampling,
            run.target,
            run.stats,
            message,
            law,
            acceptance,
            verification=ssd.verification,
        )
        with _naming("The draft's program (prepare)"):
            state = prepare(speculator, draft.params, run.draft_sampling, state)
        return dataclasses.replace(
            run,
            target=target,
            stats=stats,
            speculator=state,
            outcome=jax.device_put(outcome, draft_home),
            last_outcome=run.outcome,
        )

    def stop(run: Run, rows: np.ndarray) -> Run:
        text = stop_rows(run.speculator.text, rows)
        return dataclasses.replace(
            run,
            target=stop_rows(run.target, rows),
            speculator=dataclasses.replace(run.speculator, text=text),
        )

    return Method(
        prefill=prefill,
        advance=advance,
        view=lambda run: (run.target, run.stats, run.speculator.stats),
        stop=stop,
    )


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


def _read_prompts(model: Model, ssd: SSD, batch: Batch) -> SpeculatorState:
    """The draft device's state with the prompts read and nothing prepared."""
    draft, num_branches = ssd.draft, ssd.speculator.num_branches
    num_rows, vocab_size = len(batch.lengths), model.config.vocab_size
    with_law = ssd.verification == "rejection"
    text = initial_state(
        draft.config,
        batch.tokens,
        batch.lengths,
        batch.finish,
        dtype=draft.params.embedding.dtype,
        num_top_logprobs=None,
    )
    text = dataclasses.replace(
        text,
        cache=read_prompts(draft, batch),
        output_counts=jnp.zeros((num_rows, vocab_size), jnp.int32),
    )
    law: Float[Array, "B J V"] | None = None
    if with_law:
        law = jnp.zeros((num_rows, ssd.draft_len, vocab_size), jnp.float32)
    return SpeculatorState(
        text=text,
        prepared=no_prepared_drafts(
            num_rows, num_branches, ssd.draft_len, vocab_size, with_law=with_law
        ),
        draft=Draft(
            tokens=jnp.zeros((num_rows, ssd.draft_len), jnp.int32),
            count=jnp.zeros(num_rows, jnp.int32),
            law=law,
            drafter=jnp.zeros(num_rows, jnp.int32),
        ),
        was_hit=jnp.zeros(num_rows, bool),
        tables=learn_prompts(ssd.ngram, batch) if ssd.fallback == "ngram" else None,
        stats=LookupStats(
            lookups=jnp.zeros((num_rows, 2), jnp.int32),
            hits=jnp.zeros((num_rows, 2), jnp.int32),
            found_at=jnp.zeros((num_rows, 2, num_branches), jnp.int32),
            accepted=jnp.zeros((num_rows, 2, ssd.draft_len + 1), jnp.int32),
        ),
    )
