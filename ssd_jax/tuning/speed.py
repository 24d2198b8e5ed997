"""What a setting of SSD would reach, by the times of its parts and the outcomes of verifications.

Nothing is measured here: `measuring` does that. The model of speed is Theorem 7 of the Saguaro
paper (Corollary 16 for a batch) with the times as they are on a real machine: looking a draft up
takes some, and preparing may outlast verifying after a miss as well as after a hit.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut, measured_fan_out

WAIT_MUST_GAIN = 1.03  # a setting that lets the target wait must be so much faster than all others


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What `tune` chooses; the meanings are those of `SSD`."""

    draft_len: int
    fan_out: FanOut
    fallback: Fallback
    miss_weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of the parts of a round, for one batch size on one machine.

    Attributes:
        verify_s: a verification of 1, 2, ... drafted tokens; before them, a pass without draft.
        lookup_s: from an outcome on the target's device to the prepared draft there, dispatch
            included.
        neural_s: how much longer that takes where the draft model has to draft: at once, and for
            each token.
        ngram_s: how much longer where n-grams draft.
        prepare_s: preparing: at once, for each token, for each token of each branch.
    """

    verify_s: tuple[float, ...]
    lookup_s: float
    neural_s: tuple[float, float]
    ngram_s: float
    prepare_s: tuple[float, float, float]

    def __post_init__(self) -> None:
        if len(self.verify_s) < 2 or len(self.neural_s) != 2 or len(self.prepare_s) != 3:
            raise RequestError(
                "Times need two numbers at least for verify_s, two for neural_s and three for "
                f"prepare_s, got {self}."
            )
        rest = (self.lookup_s, self.ngram_s, *self.neural_s, *self.prepare_s)
        if not (all(0 < s < math.inf for s in self.verify_s) and all(0 <= s < 1e9 for s in rest)):
            raise RequestError(f"Times must be finite seconds, those of passes above 0: {self}.")

    @property
    def longest_draft(self) -> int:
        """The longest draft whose verification was timed."""
        return len(self.verify_s) - 1

    def prepare(self, draft_len: int, num_branches: int) -> float:
        """Seconds of preparing so many outcomes."""
        start, step, branch = self.prepare_s
        return start + draft_len * (step + branch * num_branches)

    def fall_back(self, fallback: Fallback, draft_len: int) -> float:
        """Seconds that a draft which was not prepared takes longer than one that was."""
        if fallback == "ngram":
            return self.ngram_s
        start, token = self.neural_s
        return start + draft_len * token

    def budget(self, draft_len: int) -> int:
        """The most outcomes that are prepared within a verification; 0 if none are."""
        start, step, branch = self.prepare_s
        left = self.verify_s[draft_len] - start - draft_len * step
        if left < 0:
            return 0
        return math.floor(left / (draft_len * branch)) if branch > 0 else 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """How verifications of one kind of draft came out.

    Attributes:
        accepted: int [J + 1], how often so many tokens were accepted.
        hits_by_rank: int [J + 1, F], how often the bonus token after j accepted tokens was guess f.
        lookups: outcomes after which the row went on, found or not.
    """

    accepted: np.ndarray
    hits_by_rank: np.ndarray
    lookups: int

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round emits, the bonus token included."""
        return 1 + float(self.accepted @ np.arange(len(self.accepted))) / max(
            1, int(self.accepted.sum())
        )

    def hit_rate(self, counts: Sequence[int]) -> float:
        """The share of outcomes that this fan-out list would have prepared."""
        found = sum(int(self.hits_by_rank[j, :count].sum()) for j, count in enumerate(counts))
        return found / max(1, self.lookups)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Behaviour:
    """Outcomes of prepared drafts and of a fallback's drafts.

    `foretold` says that the draft model's first guess is what it drafts itself, which holds for its
    own drafts at temperature 0 and under coupled verification.
    """

    after_hit: Outcomes
    after_miss: Outcomes
    foretold: tuple[bool, bool]

    def shortened(self, draft_len: int) -> "Behaviour":
        """The outcomes that drafts of fewer tokens would have had."""
        return Behaviour(
            after_hit=shorten(self.after_hit, draft_len, foretold=self.foretold[0]),
            after_miss=shorten(self.after_miss, draft_len, foretold=self.foretold[1]),
            foretold=self.foretold,
        )


def shorten(outcomes: Outcomes, draft_len: int, *, foretold: bool) -> Outcomes:
    """The outcomes if drafts had ended after `draft_len` tokens.

    Fewer accepted tokens stay what they were. With `draft_len` or more, the bonus token is the one
    at the next position, where nothing is drafted any more, so that every token can be guessed.
    `foretold`: what was drafted and accepted there was the first guess, and what was guess f beside
    a rejected one is guess f + 1. Otherwise the ranks are as they were behind whole drafts.
    """
    longest = len(outcomes.accepted) - 1
    if draft_len == longest:
        return outcomes
    accepted = outcomes.accepted[: draft_len + 1].copy()
    hits = outcomes.hits_by_rank[: draft_len + 1].copy()
    beyond = int(outcomes.accepted[draft_len + 1 :].sum())
    accepted[draft_len] += beyond
    if foretold:
        hits[draft_len, 1:] = outcomes.hits_by_rank[draft_len, :-1]
        hits[draft_len, 0] = beyond
    else:
        whole, total = outcomes.hits_by_rank[longest], int(outcomes.accepted[longest])
        if total == 0:
            whole, total = outcomes.hits_by_rank.sum(0), int(outcomes.accepted.sum())
        hits[draft_len] = np.round(whole * (accepted[draft_len] / max(1, total))).astype(hits.dtype)
    return Outcomes(accepted=accepted, hits_by_rank=hits, lookups=outcomes.lookups)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a setting would reach.

    Attributes:
        setting: the options.
        hit_rate: share of drafts that were prepared.
        tokens_per_round: tokens that a row gains in a round.
        verify_s: seconds of a verification.
        prepare_s: seconds of preparing for it; more than `verify_s` lets the target wait.
        round_s: seconds of a round, on average.
    """

    setting: Setting
    hit_rate: float
    tokens_per_round: float
    verify_s: float
    prepare_s: float
    round_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of one row."""
        return self.tokens_per_round / self.round_s

    @property
    def target_waits(self) -> bool:
        """Whether the draft sets the pace."""
        return self.prepare_s > self.verify_s


def stationary_hit_rate(after_hit: float, after_miss: float) -> float:
    """The share of hits in the long run, from the shares after a hit and after a miss."""
    leaving = 1 - after_hit + after_miss
    return after_miss / leaving if leaving > 0 else 0.0


def predict_rate(
    times: Times, setting: Setting, hit_rate: float, tokens_per_round: float, batch_size: int = 1
) -> Prediction:
    """The speed of a setting whose hit rate and tokens a round are known.

    A round of a batch waits for a fallback if any of its rows does (rows taken as independent).
    """
    num_branches = setting.fan_out.num_branches
    verify_s = times.verify_s[setting.draft_len]
    prepare_s = times.prepare(setting.draft_len, num_branches)
    waiting = 1 - hit_rate**batch_size
    fallback_s = times.fall_back(setting.fallback, setting.draft_len)
    return Prediction(
        setting=setting,
        hit_rate=hit_rate,
        tokens_per_round=tokens_per_round,
        verify_s=verify_s,
        prepare_s=prepare_s,
        round_s=times.lookup_s + waiting * fallback_s + max(verify_s, prepare_s),
    )


def predict(
    times: Times, behaviour: Behaviour, setting: Setting, batch_size: int = 1
) -> Prediction:
    """The speed of a setting, from how drafts of its length came out (see `shortened`)."""
    fan_out, after_hit, after_miss = setting.fan_out, behaviour.after_hit, behaviour.after_miss
    hit_rate = stationary_hit_rate(
        after_hit.hit_rate(fan_out.after_hit), after_miss.hit_rate(fan_out.after_miss)
    )
    tokens = hit_rate * after_hit.tokens_per_round + (1 - hit_rate) * after_miss.tokens_per_round
    return predict_rate(times, setting, hit_rate, tokens, batch_size)


def predict_all(
    times: Times, behaviours: Mapping[Fallback, Behaviour], batch_size: int = 1
) -> list[Prediction]:
    """The speeds of all draft lengths, budgets and fallbacks, each with its best fan-out."""
    predictions = []
    for fallback, behaviour in behaviours.items():
        for draft_len in range(1, times.longest_draft + 1):
            own = behaviour.shortened(draft_len)
            for budget in range(1, own.after_hit.hits_by_rank.size + 1):
                setting = Setting(
                    draft_len=draft_len,
                    fan_out=FanOut(
                        after_hit=measured_fan_out(own.after_hit.hits_by_rank, budget),
                        after_miss=measured_fan_out(own.after_miss.hits_by_rank, budget),
                    ),
                    fallback=fallback,
                )
                predictions.append(predict(times, own, setting, batch_size))
    return predictions


def choose(predictions: Iterable[Prediction]) -> Prediction:
    """The fastest; of equals the one with the fewest branches.

    One that lets the target wait is chosen only if it is clearly faster than all that do not: where
    both take about as long, every jitter of either adds to the round.
    """

    def merit(one: Prediction) -> tuple[float, int]:
        penalty = WAIT_MUST_GAIN if one.target_waits else 1.0
        return one.tokens_per_s / penalty, -one.setting.fan_out.num_branches

    return max(predictions, key=merit)


def crossover_batch(
    hit_rate: float,
    round_s: float,
    tokens_per_round: tuple[float, float],
    fallback_s: tuple[float, float],
) -> float:
    """The b* of Theorem 17: from this batch size on the second fallback is the faster one.

    `round_s` is a round in which all rows hit; pairs are (neural, fast). Infinite if the first is
    always faster, 0 if the second is.
    """
    (neural, fast), (neural_s, fast_s) = tokens_per_round, fallback_s
    all_miss = fast * (round_s + neural_s) - neural * (round_s + fast_s)
    spread = fast * neural_s - neural * fast_s
    if all_miss <= 0 or hit_rate >= 1:
        return math.inf
    if all_miss >= spread or hit_rate <= 0:
        return 0.0
    return math.log(all_miss / spread) / math.log(hit_rate)
