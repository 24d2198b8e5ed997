"""What speculation did for one request, as numbers for people and records."""

import dataclasses

import numpy as np

from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import NAMES, SSD
from ssd_jax.types import LookupStats, SpeculationStats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DraftCounts:
    """What a drafter did for one request; the names are vLLM's.

    Attributes:
        num_drafts: rounds in which it proposed something.
        num_draft_tokens: tokens proposed (of a draft within which the text ended, up to there).
        num_accepted_tokens: proposed tokens that stood.
        num_accepted_tokens_per_pos: how often the token at each draft position was accepted.
        num_emitted_tokens: tokens that the rounds with its proposals emitted, the target's own
            included.
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]
    num_emitted_tokens: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a round with a draft of this drafter emitted, 1 if it drafted nothing."""
        return self.num_emitted_tokens / self.num_drafts if self.num_drafts else 1.0


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
    """What speculation did for one request, as far as its text goes.

    Nothing is counted that lies behind the end of the text: the rounds after it, which the host
    learns of late, and in the last round what was drafted and accepted but not emitted.

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
            num_emitted_tokens=sum(counts.num_emitted_tokens for counts in each),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rounds:
    """The rounds of one text in order, an entry each; `size` is the number of emitted tokens."""

    begin: np.ndarray
    size: np.ndarray
    drafter: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray


def count_speculation(
    stats: SpeculationStats,
    lookups: LookupStats | None,
    row: int,
    span: slice,
    speculation: Speculation | SSD,
) -> SpeculationCounts:
    """The counts of one row whose output is the tokens in `span`."""
    rounds = _rounds(np.asarray(stats.rounds)[row, span])
    found = None
    if lookups is not None and isinstance(speculation, SSD):
        found = _count_lookups(rounds, np.asarray(lookups.found)[row, span], speculation)
    return SpeculationCounts(
        target_steps=len(rounds.begin),
        drafters={
            name: _count_drafts(rounds, rounds.drafter == index, speculation.longest_draft)
            for index, name in enumerate(speculation.names)
        },
        lookups=found,
    )


def _rounds(log: np.ndarray) -> _Rounds:
    """The rounds that a log tells of, cut where it ends."""
    begin = np.flatnonzero(log[:, 0])
    size = np.diff(begin, append=len(log))
    drafter, drafted, accepted = log[begin].T.astype(int)
    was_cut = accepted >= size  # no token of the target's own came after the accepted ones
    return _Rounds(
        begin=begin,
        size=size,
        drafter=drafter - 1,
        drafted=np.where(was_cut, np.minimum(drafted, size), drafted),
        accepted=np.minimum(accepted, size),
    )


def _count_drafts(rounds: _Rounds, own: np.ndarray, draft_len: int) -> DraftCounts:
    own = own & (rounds.drafted > 0)
    accepted = rounds.accepted[own]
    positions = np.arange(draft_len)[:, None]
    return DraftCounts(
        num_drafts=int(own.sum()),
        num_draft_tokens=int(rounds.drafted[own].sum()),
        num_accepted_tokens=int(accepted.sum()),
        num_accepted_tokens_per_pos=tuple((accepted > positions).sum(axis=1).tolist()),
        num_emitted_tokens=int(rounds.size[own].sum()),
    )


def _count_lookups(rounds: _Rounds, found: np.ndarray, ssd: SSD) -> LookupCounts:
    """What the speculation cache did: each round but the last was followed by a lookup."""
    prepared = rounds.drafter == NAMES.index("prepared")
    branch = found[rounds.begin][1:] - 1  # -1 for what was not prepared
    pairs = []
    for kind in (False, True):
        own = prepared == kind
        after = branch[own[:-1]]
        hits = after[after >= 0]
        pairs.append(
            (
                len(after),
                len(hits),
                tuple(np.bincount(hits, minlength=ssd.speculator.num_branches).tolist()),
                tuple(np.bincount(rounds.accepted[own], minlength=ssd.draft_len + 1).tolist()),
            )
        )
    lookups, hits, found_at, accepted = zip(*pairs, strict=True)
    return LookupCounts(lookups=lookups, hits=hits, found_at=found_at, accepted=accepted)
