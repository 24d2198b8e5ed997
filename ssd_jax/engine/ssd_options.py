"""What speculative speculative decoding is asked to do."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ssd_jax.decoding.ssd import Speculator
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.speculation import DEFAULT_DRAFT_LEN, DraftLen
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut, Guesses, uniform_fan_out
from ssd_jax.field_checks import Probability, check_fields
from ssd_jax.model import Model
from ssd_jax.placement import branch_mesh
from ssd_jax.verification import Verification

Fallback = Literal["neural", "ngram"]
DEFAULT_GUESSES = 3
NAMES = ("prepared", "fallback")  # of those who draft


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
        synthetic_acceptance: as in `Speculation`. The guesses still follow the models, so that the
            hit rate is not that of two models which agree so often, unless that is made up too.
        synthetic_hit_rate: count outcomes as prepared with this probability whatever was guessed,
            to measure what rounds cost; only beside synthetic_acceptance. It needs a fan-out of at
            least 1 everywhere: what has no branch at all is a miss.
    """

    draft: Model
    draft_len: DraftLen = DEFAULT_DRAFT_LEN
    fan_out: FanOut | Sequence[Guesses] | Guesses = DEFAULT_GUESSES
    fallback: Fallback = "neural"
    ngram: NgramConfig = dataclasses.field(default_factory=NgramConfig)
    verification: Verification = "coupled"
    miss_weight: Probability = 1.0
    synthetic_acceptance: Probability | None = None
    synthetic_hit_rate: Probability | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "fan_out", self.both_fan_outs)
        check_fan_out(self.draft_len, self.both_fan_outs)
        if self.synthetic_hit_rate is not None and self.synthetic_acceptance is None:
            raise RequestError(
                "synthetic_hit_rate is for rounds whose acceptance is made up as well: give "
                "synthetic_acceptance too, or leave it out."
            )
        if self.miss_weight != 1 and self.verification != "rejection":
            raise RequestError(
                "miss_weight reweights the law that drafts are drawn from, which only verification "
                f"rejection knows, got {self.verification}: leave it at 1 or choose rejection."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Whose drafts are told apart."""
        return NAMES

    @property
    def longest_draft(self) -> int:
        """Most tokens in a draft."""
        return self.draft_len

    @property
    def both_fan_outs(self) -> FanOut:
        """The fan-out as two lists."""
        if isinstance(self.fan_out, FanOut):
            return self.fan_out
        if isinstance(self.fan_out, int):
            counts = uniform_fan_out(self.draft_len, self.fan_out)
        else:
            counts = tuple(self.fan_out)
        return FanOut(after_hit=counts, after_miss=counts)

    @property
    def own_ngram(self) -> NgramConfig | None:
        """Options of the n-gram fallback, None if the draft model is the fallback."""
        if self.fallback == "neural":
            return None
        return dataclasses.replace(self.ngram, max_draft=self.draft_len, min_draft=1)

    @property
    def speculator(self) -> Speculator:
        """The options as the programs take them."""
        return Speculator(
            config=self.draft.config,
            draft_len=self.draft_len,
            fan_out=self.both_fan_outs,
            verification=self.verification,
            ngram=self.own_ngram,
            miss_weight=self.miss_weight,
            mesh=branch_mesh(self.draft),
        )


def check_fan_out(draft_len: int, fan_out: FanOut) -> None:
    """Refuse a fan-out that is not for drafts of this length.

    Raises:
        RequestError: with both lengths.
    """
    if len(fan_out.after_hit) != draft_len + 1:
        raise RequestError(
            f"A fan-out for draft_len {draft_len} has {draft_len + 1} numbers (for 0 to "
            f"{draft_len} accepted tokens), got {len(fan_out.after_hit)}."
        )
