"""What speculation is asked to do, checked against the target it is for."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from ssd_jax.decoding.speculative import verify_widths
from ssd_jax.drafting.drafter import CombinedDrafter, ModelDrafter, NgramDrafter, NoDrafter
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.errors import ConfigError, RequestError, shown
from ssd_jax.field_checks import Probability, Range, check_fields
from ssd_jax.model import Model
from ssd_jax.placement import home
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.text import Tokenizer
from ssd_jax.verification import Verification

MAX_DRAFT_LEN = 64
DEFAULT_DRAFT_LEN = 4

type DraftLen = Annotated[
    int, Range(f"from 1 to {MAX_DRAFT_LEN}", lambda n: 1 <= n <= MAX_DRAFT_LEN)
]
type RoundTime = Annotated[
    float, Range("above 0 (infinity for a draft never made)", lambda s: s > 0, wide=True)
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """Seconds of a round, by drafter and by how many tokens it proposes, from 0 on."""

    seconds: tuple[tuple[RoundTime, ...], ...]

    def __post_init__(self) -> None:
        check_fields(self, "{} of round_times")
        if len({len(row) for row in self.seconds}) > 1:
            raise RequestError(
                "seconds of round_times must be one row of equal length for each drafter, got "
                f"{shown(self.seconds)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Drafters, and draft lengths from 0 on."""
        return len(self.seconds), len(self.seconds[0]) if self.seconds else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Who drafts, how much, and how drafts are verified.

    Attributes:
        draft: the model that proposes tokens; its vocabulary must be the target's.
        ngram: options of n-gram drafting, which needs no model. With a draft model as well, n-grams
            go first and the model drafts where they have nothing. With neither, nothing is drafted:
            that is plain decoding in passes as wide as those of `draft_len` drafted tokens.
        draft_len: most tokens that a draft model proposes in a round, 1 to 64. For n-grams see
            `max_draft` of their options.
        verification: "coupled" emits the very tokens of autoregressive decoding with the same seed;
            "rejection" emits tokens of the same distribution and accepts more of them; "greedy"
            is for requests of temperature 0, which are the same under all three.
        round_times: what rounds cost (see `measure_round_times`). With them each row drafts as much
            as pays, which may be nothing; without, always as much as it may.
        exact: every pass of the target is equally wide, drafts or not. Plain decoding of the same
            width (see `ngram`) then computes bit for bit the same logits, so that ties of bfloat16
            logits fall the same way.
        synthetic_acceptance: accept drafted tokens with this probability whatever they are, to
            measure what rounds cost. The output is then not the target's.
    """

    draft: Model | None = None
    ngram: NgramConfig | None = None
    draft_len: DraftLen = DEFAULT_DRAFT_LEN
    verification: Verification = "coupled"
    round_times: RoundTimes | None = None
    exact: bool = False
    synthetic_acceptance: Probability | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.draft is None and self.ngram is None and not self.exact:
            raise RequestError(
                "Speculation needs someone who drafts, got neither a draft model nor n-gram "
                "options: give one, or leave speculation out."
            )
        if self.exact and self.round_times is not None:
            raise RequestError(
                "exact makes all passes equally wide, so that shorter drafts save nothing: leave "
                "out round_times or exact."
            )
        if self.round_times is not None:
            shape = len(self.drafter.names), self.longest_draft + 1
            if self.round_times.shape != shape:
                raise RequestError(
                    f"round_times must be measured for this speculation, expected {shape} "
                    f"(drafters, draft lengths from 0), got {self.round_times.shape}."
                )

    @property
    def drafter(self) -> NoDrafter | ModelDrafter | NgramDrafter | CombinedDrafter:
        """The drafter as the loop takes it."""
        ngram = None if self.ngram is None else NgramDrafter(config=self.ngram)
        if self.draft is None:
            return ngram or NoDrafter(draft_len=self.draft_len)
        model = ModelDrafter(
            config=self.draft.config,
            draft_len=self.draft_len,
            verification=self.verification,
            may_decline=ngram is not None or self.round_times is not None,
        )
        return model if ngram is None else CombinedDrafter(ngram=ngram, model=model)

    @property
    def names(self) -> tuple[str, ...]:
        """Whose drafts are told apart."""
        return self.drafter.names

    @property
    def longest_draft(self) -> int:
        """Most tokens in a draft of any drafter."""
        return self.drafter.draft_len

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens in a pass of the target (see `verify_widths`)."""
        may_decline = self.drafter.may_decline and not self.exact
        return verify_widths(self.longest_draft, may_decline=may_decline)


def check_options(verification: Verification, params: Sequence[SamplingParams]) -> None:
    """Refuse requests that a verification cannot serve.

    Raises:
        RequestError: a request that samples, where verification is greedy.
    """
    for options in params:
        if verification == "greedy" and options.temperature > 0:
            raise RequestError(
                "Greedy verification needs temperature 0, got a request of temperature "
                f"{options.temperature}: choose coupled or rejection."
            )


def check_pair(target: Model, draft: Model) -> None:
    """Refuse a draft that does not speak the target's vocabulary.

    Embeddings padded to different sizes are fine; the maps between tokens and ids must agree.
    A draft with a shorter context drafts as far as that goes.

    Raises:
        ConfigError: naming the first id at which they differ.
    """
    if target.tokenizer is None or draft.tokenizer is None:
        if target.config.vocab_size != draft.config.vocab_size:
            raise ConfigError(
                "Without tokenizers, target and draft must have the same vocab_size, got "
                f"{target.config.vocab_size} and {draft.config.vocab_size}."
            )
        return
    if target.vocabulary == draft.vocabulary:
        return  # quickly, since every call comes by here
    mismatch = first_mismatch(target.tokenizer, draft.tokenizer)
    if mismatch is not None:
        token_id, ours, theirs = mismatch
        raise ConfigError(
            f"Target and draft must share one vocabulary, but id {token_id} is {ours!r} for the "
            f"target and {theirs!r} for the draft: choose a draft of the same tokenizer."
        )


def check_devices(target: Model, draft: Model) -> None:
    """Refuse a draft on other devices than the target's, as one program runs both.

    Raises:
        ConfigError: naming both.
    """
    places = [home(model).device_set for model in (target, draft)]
    if places[0] != places[1]:
        ours, theirs = (", ".join(sorted(map(str, devices))) for devices in places)
        raise ConfigError(
            f"Speculation runs target and draft on the same devices, got the target on {ours} and "
            f"the draft on {theirs}: place both alike, or take SSD, which has them work side by "
            "side."
        )


def first_mismatch(one: Tokenizer, other: Tokenizer) -> tuple[int, str | None, str | None] | None:
    """The lowest id that two tokenizers give to different tokens, with both tokens, or None."""
    by_id = [
        {token_id: token for token, token_id in tokenizer.vocabulary().items()}
        for tokenizer in (one, other)
    ]
    for token_id in sorted(by_id[0].keys() | by_id[1].keys()):
        tokens = by_id[0].get(token_id), by_id[1].get(token_id)
        if tokens[0] != tokens[1]:
            return token_id, *tokens
    return None
