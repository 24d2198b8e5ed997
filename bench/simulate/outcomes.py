"""How verifications come out: how many tokens are accepted, which guess the bonus token was."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import root_scalar

from ssd_jax.errors import RequestError
from ssd_jax.tuning.speed import Outcomes, stationary_hit_rate

MOST_GUESSES = 64  # of a power law


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutcomeLaw:
    """Chances of the outcomes of one kind of draft.

    Attributes:
        accepted: float [J + 1], that so many tokens are accepted.
        guessed: float [J + 1, F], that the bonus token after j accepted ones is guess f; what is
            missing to 1 is none of them.
    """

    accepted: np.ndarray
    guessed: np.ndarray

    def __post_init__(self) -> None:
        rows, sums = len(self.accepted), self.guessed.sum(-1)
        if self.guessed.ndim != 2 or len(self.guessed) != rows or rows < 1:
            raise RequestError(
                f"Guesses should be told for 0 to {rows - 1} accepted tokens, got an array of "
                f"shape {self.guessed.shape}."
            )
        chances = np.concatenate([self.accepted, self.guessed.ravel(), sums])
        if not np.all((chances >= -1e-9) & (chances <= 1 + 1e-9)):
            raise RequestError("Chances of outcomes must be from 0 to 1.")
        if abs(self.accepted.sum() - 1) > 1e-6:
            raise RequestError(
                f"The chances of accepted lengths must sum to 1, got {self.accepted.sum()}."
            )

    @property
    def draft_len(self) -> int:
        """The longest draft."""
        return len(self.accepted) - 1

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round emits, the bonus token included."""
        return 1 + float(self.accepted @ np.arange(len(self.accepted)))

    def hit_chances(self, counts: Sequence[int]) -> np.ndarray:
        """Float [J + 1], that the outcome with j accepted tokens is among the prepared ones.

        Raises:
            RequestError: more guesses than it is known how often they come true.
        """
        if max(counts) > self.guessed.shape[1]:
            raise RequestError(
                f"It is known of {self.guessed.shape[1]} guesses how often they come true, got a "
                f"fan-out with {max(counts)}: lower it, or measure with a wider one."
            )
        summed = np.concatenate([np.zeros((len(self.guessed), 1)), self.guessed.cumsum(-1)], -1)
        return np.clip(summed[np.arange(len(counts)), list(counts)], 0, 1)

    def hit_rate(self, counts: Sequence[int]) -> float:
        """The chance that an outcome has been prepared."""
        return float(self.accepted @ self.hit_chances(counts))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutcomeLaws:
    """Outcomes of the draft model's drafts, prepared or synchronous, and of the fallback's."""

    after_hit: OutcomeLaw
    after_miss: OutcomeLaw

    def stationary_hit_rate(self, after_hit: Sequence[int], after_miss: Sequence[int]) -> float:
        """The share of hits in the long run with these fan-outs."""
        return stationary_hit_rate(
            self.after_hit.hit_rate(after_hit), self.after_miss.hit_rate(after_miss)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """F guesses miss the bonus token with chance `first_miss` * F ** -`decay`.

    Source: Definition 11 of the Saguaro paper, where `first_miss` is 1; with that a single guess
    would never come true.
    """

    first_miss: float
    decay: float

    def __post_init__(self) -> None:
        if not (0 <= self.first_miss <= 1 and self.decay > 0):
            raise RequestError(
                "A power law needs a chance to miss with one guess from 0 to 1 and a decay above "
                f"0, got {self.first_miss} and {self.decay}."
            )

    def guesses(self) -> np.ndarray:
        """Float [F], that the bonus token is guess f."""
        misses = self.first_miss * np.arange(1, MOST_GUESSES + 1, dtype=np.float64) ** -self.decay
        return -np.diff(misses, prepend=1.0)


def power_law_through(guesses: int, hit_rate: float, decay: float) -> PowerLaw:
    """The law by which so many guesses hold the bonus token at that rate.

    Raises:
        RequestError: it decays so fast that so many guesses hold more.
    """
    first_miss = (1 - hit_rate) * guesses**decay
    if not first_miss <= 1 + 1e-9:
        raise RequestError(
            f"With a decay of {decay:g}, {guesses} guesses hold at least "
            f"{1 - guesses**-decay:.3g} of the outcomes, got {hit_rate:g}: lower the decay."
        )
    return PowerLaw(first_miss=min(1.0, first_miss), decay=decay)


def geometric_law(draft_len: int, acceptance: float, guesses: PowerLaw) -> OutcomeLaw:
    """Every token is accepted with the same chance, and guessed equally well everywhere."""
    if not 0 <= acceptance <= 1:
        raise RequestError(f"An acceptance must be from 0 to 1, got {acceptance}.")
    accepted = acceptance ** np.arange(draft_len + 1) * (1 - acceptance)
    accepted[-1] = acceptance**draft_len
    return OutcomeLaw(
        accepted=accepted, guessed=np.broadcast_to(guesses.guesses(), (draft_len + 1, MOST_GUESSES))
    )


def geometric_tokens(draft_len: int, acceptance: float) -> float:
    """Tokens a round: 1 + a + ... + a ** draft_len."""
    return float(np.sum(acceptance ** np.arange(draft_len + 1)))


def acceptance_for(draft_len: int, tokens_per_round: float) -> float:
    """The acceptance with which drafts of that length emit so many tokens a round.

    Raises:
        RequestError: no acceptance does.
    """
    if not 1 <= tokens_per_round <= draft_len + 1:
        raise RequestError(
            f"A round with {draft_len} drafted tokens emits from 1 to {draft_len + 1}, got "
            f"{tokens_per_round:.3g} tokens a round: check the times and the speed it follows from."
        )
    return root_scalar(
        lambda acceptance: geometric_tokens(draft_len, acceptance) - tokens_per_round,
        bracket=(0.0, 1.0),
    ).root


def counted_law(outcomes: Outcomes) -> OutcomeLaw:
    """The chances in what was counted.

    Raises:
        RequestError: nothing was.
    """
    judged = outcomes.accepted.sum()
    if judged == 0:
        raise RequestError("A trace must have a verified draft of each kind, got none of one.")
    # The last outcome of an answer is judged but never looked up; it counts like the others.
    looked_up = np.maximum(outcomes.accepted * (outcomes.lookups / judged), 1e-12)[:, None]
    guessed = outcomes.hits_by_rank / np.maximum(looked_up, outcomes.hits_by_rank.sum(-1)[:, None])
    return OutcomeLaw(accepted=outcomes.accepted / judged, guessed=guessed)


def summary_laws(draft_len: int, tokens_per_round: float, hit_rate: float) -> OutcomeLaws:
    """Laws of which only the means are known: tokens a round, and hits whatever the fan-out."""
    guessed = np.zeros((draft_len + 1, MOST_GUESSES))
    guessed[:, 0] = hit_rate
    law = geometric_law(draft_len, acceptance_for(draft_len, tokens_per_round), _NEVER)
    law = OutcomeLaw(accepted=law.accepted, guessed=guessed)
    return OutcomeLaws(after_hit=law, after_miss=law)


_NEVER = PowerLaw(first_miss=1.0, decay=1.0)
