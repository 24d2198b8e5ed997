"""Contenders in turns on the same prompts: their outputs, their times, and the ratios of these."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from bench.peers.client import Peer, PeerError
from bench.peers.contenders import BASELINE, OURS, Contender
from bench.peers.protocol import Answer, Run

CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What one contender did with one prompt.

    Attributes:
        output: the answer of the unmeasured first turn.
        timed: the answers of the measured turns, without their tokens and text.
    """

    output: Answer
    timed: tuple[Answer, ...]

    @property
    def decode_tokens(self) -> int:
        """Tokens of one answer that were decoded after the first."""
        return self.timed[0].decode_tokens

    @property
    def decode_s(self) -> float:
        """Median over the turns."""
        return statistics.median(answer.decode_s for answer in self.timed)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return self.decode_tokens / self.decode_s

    @property
    def first_s(self) -> float | None:
        """Median over the turns."""
        values = [answer.first_s for answer in self.timed if answer.first_s is not None]
        return statistics.median(values) if values else None

    @property
    def whole_s(self) -> float:
        """Median of the whole answer's time, the prompt included."""
        return statistics.median((one.first_s or 0.0) + one.decode_s for one in self.timed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What all contenders did; those that failed are in `failed` alone, with the reason."""

    turns: dict[Contender, tuple[Turns, ...]]
    failed: dict[Contender, str]

    @property
    def num_prompts(self) -> int:
        """How many prompts were answered by all who are not left out."""
        return len(next(iter(self.turns.values())))


def measure(
    peers: Mapping[str, Peer],
    known: Results,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
) -> Iterator[Results]:
    """What is known, with every contender's answers to one more prompt, prompt after prompt.

    Contenders take turns within each prompt. Each answers it once unmeasured; that compiles and
    warms up. A contender that fails, or gives another number of tokens than it was asked for, is
    left out from there on.

    Raises:
        PeerError: plain decoding of ours failed, which all others are compared with.
    """
    for number, prompt in enumerate(prompts[known.num_prompts :], start=known.num_prompts + 1):
        progress(f"prompt {number} of {len(prompts)}")
        answers: dict[Contender, list[Answer]] = {contender: [] for contender in known.turns}
        failed = dict(known.failed)
        for _ in range(rounds + 1):
            for contender in list(answers):
                try:
                    answer = _ask(peers[contender.peer], contender, prompt, max_tokens)
                except PeerError as error:
                    if contender == BASELINE:
                        raise
                    progress(f"{contender.name} left out: {error}")
                    failed[contender] = str(error)
                    del answers[contender]
                else:
                    answers[contender].append(answer)
        turns = {
            contender: (*known.turns[contender], _turns(*given))
            for contender, given in answers.items()
        }
        known = Results(turns=turns, failed=failed)
        yield known


def _turns(output: Answer, *timed: Answer) -> Turns:
    return Turns(
        output=output,
        timed=tuple(dataclasses.replace(answer, tokens=None, text=None) for answer in timed),
    )


def _ask(peer: Peer, contender: Contender, prompt: Sequence[int], max_tokens: int) -> Answer:
    answer = peer.run(
        Run(
            mode=contender.mode,
            options=dict(contender.options),
            prompt=list(prompt),
            max_tokens=max_tokens,
        )
    )
    if answer.tokens is not None and len(answer.tokens) != max_tokens:
        raise PeerError(
            f"{contender.name} should give {max_tokens} tokens, it gave {len(answer.tokens)}."
        )
    if answer.decode_s <= 0 or answer.decode_tokens <= 0:
        raise PeerError(
            f"{contender.name} gave everything at once, so that decoding has no time of its own: "
            "ask for more tokens."
        )
    return answer


def summarise(
    results: Results, decode_text: Callable[[Sequence[int]], str] | None
) -> dict[str, object]:
    """The figures for the record; spreads are [minimum, median, maximum] over prompts.

    `decode_text` makes text of ids, to compare with contenders that give text only.
    """
    plain = results.turns[BASELINE]
    figures = {
        contender.name: _figures(turns, plain, decode_text)
        for contender, turns in results.turns.items()
    }
    return {
        "contenders": figures,
        "failed": {contender.name: reason for contender, reason in results.failed.items()},
        "best": _best(results),
    }


def _figures(
    turns: Sequence[Turns],
    plain: Sequence[Turns],
    decode_text: Callable[[Sequence[int]], str] | None,
) -> dict[str, object]:
    firsts = [one.first_s for one in turns if one.first_s is not None]
    drafted = [one.output.drafted for one in turns if one.output.drafted is not None]
    accepted = [one.output.accepted for one in turns if one.output.accepted is not None]
    same = [
        common_length(one.output, reference.output, decode_text)
        for one, reference in zip(turns, plain, strict=True)
    ]
    return {
        "decode_tokens_per_s": total_rate(turns),
        "decode_tokens_per_s_spread": spread([one.decode_rate for one in turns]),
        "fastest_decode_tokens_per_s": fastest_rate(turns),
        "decode_ratio_to_ours_ar": total_rate(turns) / total_rate(plain),
        "decode_ratio_to_ours_ar_spread": spread(_ratios(turns, plain)),
        "first_s_spread": spread(firsts) if firsts else None,
        "whole_s_spread": spread([one.whole_s for one in turns]),
        "outputs_that_differ": sum(length is not None for length in same),
        "first_differences": [length for length in same if length is not None],
        "num_draft_tokens": sum(drafted) if drafted else None,
        "num_accepted_tokens": sum(accepted) if accepted else None,
    }


def common_length(
    answer: Answer, reference: Answer, decode_text: Callable[[Sequence[int]], str] | None
) -> int | None:
    """Where an answer first differs from the reference's, in tokens or else characters; or None."""
    if answer.tokens is not None and reference.tokens is not None:
        return _first_difference(answer.tokens, reference.tokens)
    if answer.text is None or reference.tokens is None or decode_text is None:
        return 0  # nothing to compare counts as different
    # What a cut character at the end becomes, engines decide differently.
    wanted = decode_text(reference.tokens).rstrip(CUT_CHARACTER)
    return _first_difference(answer.text.rstrip(CUT_CHARACTER), wanted)


def _first_difference[T](one: Sequence[T], other: Sequence[T]) -> int | None:
    pairs = zip(one, other, strict=False)
    for position, (left, right) in enumerate(pairs):
        if left != right:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def _best(results: Results) -> dict[str, object]:
    """The fastest of each peer, and by how much ours is faster than those."""
    best: dict[str, Contender] = {}
    for contender, turns in results.turns.items():
        known = best.get(contender.peer)
        if known is None or total_rate(turns) > total_rate(results.turns[known]):
            best[contender.peer] = contender
    ours = results.turns[best[OURS]]
    return {
        peer: {
            "contender": contender.name,
            "decode_tokens_per_s": total_rate(results.turns[contender]),
            "ours_over_it": total_rate(ours) / total_rate(results.turns[contender]),
            "ours_over_it_spread": spread(_ratios(ours, results.turns[contender])),
            "ours_over_it_by_fastest_turns": fastest_rate(ours)
            / fastest_rate(results.turns[contender]),
        }
        for peer, contender in best.items()
    }


def total_rate(turns: Sequence[Turns]) -> float:
    """Tokens per second of decoding over all prompts."""
    return sum(one.decode_tokens for one in turns) / sum(one.decode_s for one in turns)


def fastest_rate(turns: Sequence[Turns]) -> float:
    """The same of each prompt's fastest turn, which other programs on the machine disturb least."""
    seconds = sum(min(answer.decode_s for answer in one.timed) for one in turns)
    return sum(one.decode_tokens for one in turns) / seconds


def _ratios(one: Sequence[Turns], other: Sequence[Turns]) -> list[float]:
    pairs = zip(one, other, strict=True)
    return [left.decode_rate / right.decode_rate for left, right in pairs]


def spread(values: Sequence[float]) -> list[float]:
    """Minimum, median and maximum."""
    return [min(values), statistics.median(values), max(values)]
