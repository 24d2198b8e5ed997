"""Seconds of the parts of a round: worked out for chips, or as they were measured.

Whatever has these functions can be simulated. All times are of one batch size, which those for
chips are made for and measured ones were measured with.
"""

import dataclasses
from typing import Protocol

from bench.simulate.chips import Chip, Latencies, ModelShape, pass_s
from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError
from ssd_jax.tuning.speed import Times


class Costs(Protocol):
    """Seconds of the parts of a round."""

    @property
    def lookup_s(self) -> float:
        """From an outcome on the draft's device to the prepared draft leaving it."""
        ...

    @property
    def hop_s(self) -> float:
        """From one device to the other."""
        ...

    @property
    def dispatch_s(self) -> float:
        """Starting a verification by itself, as SSD does, instead of in a loop on the device."""
        ...

    @property
    def host_s(self) -> float:
        """What dispatching a round takes from the draft's device, if it has no core of its own."""
        ...

    @property
    def overlap(self) -> float:
        """How many times as long target and draft take while the other is at work too."""
        ...

    def verify(self, draft_len: int) -> float:
        """A pass of the target over so many drafted tokens, and judging them."""
        ...

    def draft(self, draft_len: int) -> float:
        """Drafting so many tokens between two verifications."""
        ...

    def fall_back(self, fallback: Fallback, draft_len: int) -> float:
        """How much later a draft comes that was not prepared."""
        ...

    def prepare(self, draft_len: int, num_branches: int) -> float:
        """Drafting after so many outcomes of every row."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """Times as `ssd-jax tune` measures them, and what it does not.

    `draft_s` is what synchronous drafting takes at once and for each token.
    """

    times: Times
    draft_s: tuple[float, float]
    hop_s: float = 0.0
    dispatch_s: float = 0.0
    host_s: float = 0.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        if min(*self.draft_s, self.hop_s, self.dispatch_s, self.host_s) < 0 or self.overlap < 1:
            raise RequestError(
                "Times must not be negative and overlap (how many times as long programs take at "
                f"the same time) must be at least 1, got {self.draft_s}, {self.hop_s}, "
                f"{self.dispatch_s}, {self.host_s} and {self.overlap}."
            )

    @property
    def lookup_s(self) -> float:
        """As measured."""
        return self.times.lookup_s

    def verify(self, draft_len: int) -> float:
        """As measured.

        Raises:
            RequestError: no pass of that width was timed.
        """
        if draft_len > self.times.longest_draft:
            raise RequestError(
                f"The times are of drafts up to {self.times.longest_draft} tokens, got a method "
                f"with {draft_len}: lower its k, or measure longer ones."
            )
        return self.times.verify_s[draft_len]

    def draft(self, draft_len: int) -> float:
        """A straight line in the tokens."""
        return self.draft_s[0] + draft_len * self.draft_s[1]

    def fall_back(self, fallback: Fallback, draft_len: int) -> float:
        """As measured."""
        return self.times.fall_back(fallback, draft_len)

    def prepare(self, draft_len: int, num_branches: int) -> float:
        """As measured."""
        return self.times.prepare(draft_len, num_branches)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """What an engine adds to the passes of its models, whatever their size.

    Attributes:
        lookup_s: see `Costs`.
        hop_s: see `Costs`.
        judge_s: of a verification, besides the target's pass.
        ngram_s: a draft by n-grams.
        glue_s: reading the new text again, choosing the guesses.
        tree_s: a step of the tree: mask, sampling, launching.
        branch_s: of that, for each branch of each row.
    """

    lookup_s: float
    hop_s: float
    judge_s: float
    ngram_s: float
    glue_s: float
    tree_s: float
    branch_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which models run on which chips.

    Attributes:
        target_chips: chips that divide the target's weights.
        draft_chips: chips with the whole draft model, which divide the branches.
        context: tokens of text in front of each row, on average.
    """

    chip: Chip
    target: ModelShape
    draft: ModelShape
    target_chips: int
    draft_chips: int
    context: int

    def __post_init__(self) -> None:
        if min(self.target_chips, self.draft_chips) < 1 or self.context < 0:
            raise RequestError(
                "A placement needs a chip at least for the target and for the draft, and a context "
                f"that is not negative, got {self.target_chips}, {self.draft_chips} and "
                f"{self.context}."
            )

    def with_draft_chips(self, number: int) -> "Placement":
        """The same with so many chips for the draft."""
        return dataclasses.replace(self, draft_chips=number)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChipCosts:
    """Times worked out for a placement and a batch size. On chips of their own nothing collides."""

    placement: Placement
    latencies: Latencies
    engine: EngineTimes
    batch: int
    dispatch_s: float = 0.0  # is part of judging
    host_s: float = 0.0  # has cores of its own
    overlap: float = 1.0

    @property
    def lookup_s(self) -> float:
        """The engine's."""
        return self.engine.lookup_s

    @property
    def hop_s(self) -> float:
        """The engine's."""
        return self.engine.hop_s

    def verify(self, draft_len: int) -> float:
        """A pass over the batch's drafts; without any it is plain decoding."""
        rows = self.batch * (draft_len + 1)
        seconds = self._pass(self.placement.target, self.placement.target_chips, rows)
        return seconds + (self.engine.judge_s if draft_len else 0.0)

    def draft(self, draft_len: int) -> float:
        """A step for each token and one more, which reads the last one."""
        return (draft_len + 1) * self._draft_pass(self.batch)

    def fall_back(self, fallback: Fallback, draft_len: int) -> float:
        """n-grams, or a step for each token."""
        if fallback == "ngram":
            return self.engine.ngram_s
        return draft_len * self._draft_pass(self.batch)

    def prepare(self, draft_len: int, num_branches: int) -> float:
        """The trunk again, and a tree step for each token."""
        branches = self.batch * num_branches / self.placement.draft_chips
        step_s = self._draft_pass(branches) - self.latencies.step_s  # its launch is in tree_s
        step_s += self.engine.tree_s + branches * self.engine.branch_s
        return self.engine.glue_s + draft_len * step_s

    def _draft_pass(self, rows: float) -> float:
        return self._pass(self.placement.draft, 1, rows)

    def _pass(self, shape: ModelShape, chips: int, rows: float) -> float:
        kv_tokens = self.batch * self.placement.context
        return pass_s(
            shape,
            self.placement.chip,
            self.latencies,
            chips=chips,
            rows=rows,
            kv_tokens=kv_tokens,
        )
