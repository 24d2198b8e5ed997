"""Tokens in, final text out: detokenising and stop strings together."""

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_jax.text.detokenizer import Detokenizer
from ssd_jax.text.stop_strings import StopMatcher
from ssd_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What one push added to a text.

    `text` is final. `num_tokens` counts the tokens of the whole stream so far; after a stop it is
    the number up to and including the token that completed the stop string, and tokens behind that
    one never count. `stop` is the stop string that was found.
    """

    text: str
    num_tokens: int
    finished: bool
    stop: str | None


class TextStream:
    """Text of one generation, cut before the first stop string; the prompt's text comes before it.

    Texts and counts do not depend on how the tokens are cut into pushes.

    Raises:
        RequestError: a stop string is empty.
        CheckpointError: the tokenizer cannot be decoded incrementally.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stops: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, prompt_ids=prompt_ids, skip_special_tokens=skip_special_tokens
        )
        self._matcher = StopMatcher(stops)
        self._num_tokens = 0
        self._finished = False

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Text that these ids make final; ids behind a stop, or after `flush`, are ignored.

        A stop string counts as complete with the token that makes its last character final.
        """
        texts = []
        for token_id in ids:
            if self._finished:
                break
            self._num_tokens += 1
            text, self._finished = self._matcher.push(self._detokenizer.push((token_id,)))
            texts.append(text)
        return self._delta("".join(texts))

    def flush(self) -> TextDelta:
        """Text that was still held; the stream is finished then."""
        if self._finished:
            return self._delta("")
        text, _ = self._matcher.push(self._detokenizer.flush())
        self._finished = True
        return self._delta(text + self._matcher.flush())

    def _delta(self, text: str) -> TextDelta:
        return TextDelta(
            text=text,
            num_tokens=self._num_tokens,
            finished=self._finished,
            stop=self._matcher.matched,
        )
