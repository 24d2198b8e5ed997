"""What speculation did for one request, as numbers for people and records."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ssd_jax.types import LookupStats, SpeculationStats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """What a drafter did for one request; the names are vLLM's.

    Attributes:
        num_drafts: rounds in which it proposed something.
        num_draft_tokens: tokens proposed.
        num_accepted_tokens: proposed tokens that stood (those behind a stop string, which are
            dropped, included: as many as were decoded until the host saw the string).
        num_accepted_tokens_per_pos: how often the token at each draft position was accepted.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a round with a draft of this drafter emitted, the bonus token included."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LookupCounts:
    """What the speculation cache of SSD did for one request; pairs are (after a miss, after a hit).

    Attributes:
        lookups: outcomes looked up.
        hits: outcomes that had been prepared.
        found_at: how often in each branch (see `fan_out.branch_layout`).
        accepted: how often 0, 1, ... draft_len tokens of a draft were accepted.
    """

    lookups: tuple[int, int]
    hits: tuple[int, int]
    found_at: tuple[tuple[int, ...], tuple[int, ...]]
    accepted: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def hit_rate(self) -> float:
        """Hits over lookups."""
        return sum(self.hits) / max(1, sum(self.lookups))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCounts:
    """What speculation did for one request.

    Attributes:
        target_steps: passes of the target after prefill.
        drafters: the counts of each drafter, by name ("draft", "ngram"; of SSD "prepared" and
            "fallback").
        lookups: of SSD, what its speculation cache did.
    """

    target_steps: int
    drafters: dict[str, DraftCounts]
    lookups: LookupCounts | None

    @property
    def total(self) -> DraftCounts:
        """The counts of all drafters together."""
        each = list(self.drafters.values())
        per_pos = zip(*(counts.num_accepted_tokens_per_pos for counts in each), strict=True)
        return DraftCounts(
            num_drafts=sum(counts.num_drafts for counts in each),
            num_draft_tokens=sum(counts.num_draft_tokens for counts in each),
            num_accepted_tokens=sum(counts.num_accepted_tokens for counts in each),
            num_accepted_tokens_per_pos=tuple(map(sum, per_pos)),
        )


def count_speculation(
    stats: SpeculationStats, lookups: LookupStats | None, row: int, drafters: Sequence[str]
) -> SpeculationCounts:
    """One row's counts; `drafters` are the names of those who draft, in the statistics' order."""
    return SpeculationCounts(
        target_steps=int(stats.target_steps[row]),
        drafters={
            name: DraftCounts(
                num_drafts=int(stats.drafts[row, index]),
                num_draft_tokens=int(stats.drafted[row, index]),
                num_accepted_tokens=int(stats.accepted[row, index]),
                num_accepted_tokens_per_pos=tuple(stats.accepted_at[row, index].tolist()),
            )
            for index, name in enumerate(drafters)
        },
        lookups=None if lookups is None else _count_lookups(lookups, row),
    )


def _count_lookups(stats: LookupStats, row: int) -> LookupCounts:
    after_miss, after_hit = (
        tuple(np.asarray(values[row, kind]).tolist() for values in (stats.found_at, stats.accepted))
        for kind in (0, 1)
    )
    return LookupCounts(
        lookups=(int(stats.lookups[row, 0]), int(stats.lookups[row, 1])),
        hits=(int(stats.hits[row, 0]), int(stats.hits[row, 1])),
        found_at=(tuple(after_miss[0]), tuple(after_hit[0])),
        accepted=(tuple(after_miss[1]), tuple(after_hit[1])),
    )
