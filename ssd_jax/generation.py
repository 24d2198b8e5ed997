"""The public functions: `generate` for whole outputs, `stream` for text as it comes.

Both run the same programs. Without stop strings the whole loop stays on the device; with them the
host looks at the text some twenty times a second, and what was decoded past a stop is dropped.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from ssd_jax.decoding.finish import Finish
from ssd_jax.engine.batch import Batch, Request, make_batch, make_requests
from ssd_jax.engine.counts import SpeculationCounts, count_speculation
from ssd_jax.engine.method import Method, autoregressive, speculative
from ssd_jax.engine.speculation import Speculation, check_devices, check_options, check_pair
from ssd_jax.engine.ssd import speculative_speculative
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.field_checks import check
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.text import TextStream
from ssd_jax.types import Logprobs, LookupStats, SpeculationStats

FEWEST_STEPS, MOST_STEPS = 8, 64  # steps between two looks of the host, where it has to look
SECONDS_BETWEEN_LOOKS = 0.05
GREEDY = SamplingParams()
_REASONS = {
    Finish.EOS: "eos",
    Finish.LENGTH: "length",
    Finish.STOP: "stop",
    Finish.ERROR: "error",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probability (nats) of an emitted token, and of the most likely tokens at its position.

    They are of the law that the token was drawn from; for a greedy row, of its law at temperature
    1.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished output.

    Attributes:
        text: the output without special tokens and without what ended it; empty without tokenizer.
            Put behind the prompt's text, it is what prompt and output decode to, unless it was to
            be a reply.
        token_ids: every emitted token, an EOS token included, up to the one that completed a stop
            string.
        finish_reason: "eos" (an EOS or stop id), "stop" (a stop string), "length", or "error": the
            logits after the last token were NaN or infinite, or no token was possible.
        prompt_tokens: tokens of the prompt.
        seed: what to pass to get the same output again.
        logprobs: one entry a token if asked for.
        speculation: its statistics, if there was any.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    seed: int
    logprobs: tuple[TokenLogprobs, ...] | None
    speculation: SpeculationCounts | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one row: its new text and tokens, and the completion once it is done."""

    row: int
    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    *,
    speculation: Speculation | SSD | None = None,
    as_reply: bool = False,
) -> list[Completion]:
    """One completion for each prompt, in order; the prompts are decoded together as one batch.

    A text continues its prompt's, so that it may begin with a space. With `as_reply` it is a text
    by itself, as an answer in a chat is: tokenizers that write a space in front of every first
    word, such as Llama 2's, then drop it.

    Exactness: a row's output depends on its own prompt, options and seed alone, not on the others.
    (One exception: n-gram kind "mod" drafts from a table that all rows share. Under verification
    "rejection" that may change a sampled row's tokens, not their law.)

    Raises:
        RequestError, MemoryBudgetError: before anything runs, in words.
    """
    requests = make_requests(model, prompts, params)
    must_look = any(request.params.stop for request in requests)
    completions: list[Completion | None] = [None] * len(requests)
    for delta in _run(model, requests, speculation, must_look=must_look, as_reply=as_reply):
        if delta.completion is not None:
            completions[delta.row] = delta.completion
    return [completion for completion in completions if completion is not None]


def stream(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    *,
    speculation: Speculation | SSD | None = None,
    as_reply: bool = False,
) -> Iterator[Delta]:
    """The outputs of `generate` piece by piece; a row's last piece carries its completion.

    Text never ends within a UTF-8 character or within what may still become a stop string.
    """
    requests = make_requests(model, prompts, params)
    return _run(model, requests, speculation, must_look=True, as_reply=as_reply)


def choose_method(
    model: Model, requests: Sequence[Request], speculation: Speculation | SSD | None
) -> tuple[Method, Batch]:
    """How the requests will be decoded, and the requests as its batch.

    Raises:
        ConfigError, RequestError, MemoryBudgetError: what does not go together, in words.
    """
    check("speculation", speculation, Speculation | SSD | None)
    if speculation is None:
        return autoregressive(model), make_batch(model, requests)
    if speculation.draft is not None:
        check_pair(model, speculation.draft)
        if isinstance(speculation, Speculation):
            check_devices(model, speculation.draft)
    check_options(speculation.verification, [request.params for request in requests])
    batch = make_batch(model, requests, speculation.longest_draft, speculation)
    if isinstance(speculation, SSD):
        return speculative_speculative(model, speculation), batch
    return speculative(model, speculation), batch


def _run(
    model: Model,
    requests: Sequence[Request],
    speculation: Speculation | SSD | None,
    *,
    must_look: bool,
    as_reply: bool,
) -> Iterator[Delta]:
    """Decode the requests; where the host must look, after the first step and then every while."""
    method, batch = choose_method(model, requests, speculation)
    check("as_reply", as_reply, bool)
    rows = [
        _Row(model, index, request, speculation, as_reply=as_reply)
        for index, request in enumerate(requests)
    ]
    state = method.prefill(batch)
    num_steps = 1 if must_look else batch.max_steps
    while any(row.completion is None for row in rows):
        started = time.perf_counter()
        state = method.advance(batch, state, num_steps)
        target, stats, lookups = method.view(state)
        tokens, lengths, finish = jax.device_get((target.tokens, target.lengths, target.finish))
        if must_look:
            num_steps = steps_until_look(num_steps, time.perf_counter() - started)
        details = functools.cache(
            functools.partial(jax.device_get, (target.logprobs, stats, lookups))
        )
        stopped = np.zeros(batch.lengths.shape, bool)
        for row in rows:
            if row.completion is None:
                delta = row.advance(tokens, lengths, finish, details)
                if delta is not None:
                    stopped[row.index] = delta.completion is not None
                    yield delta
        if stopped.any():
            state = method.stop(state, stopped)


def steps_until_look(num_steps: int, seconds: float) -> int:
    """Steps before the host looks again, when the last so many took that many seconds.

    A look costs the host about a millisecond, which is much beside the tokens of a small model and
    nothing beside those of a large one; the text of both should flow.
    """
    wanted = num_steps * SECONDS_BETWEEN_LOOKS / max(seconds, 1e-9)
    return int(min(max(wanted, FEWEST_STEPS), MOST_STEPS))


_Details = tuple[Logprobs | None, SpeculationStats | None, LookupStats | None]


class _Row:
    """What the host keeps for one request while it is decoded."""

    def __init__(
        self,
        model: Model,
        index: int,
        request: Request,
        speculation: Speculation | SSD | None,
        *,
        as_reply: bool,
    ) -> None:
        self.index = index
        self._speculation = speculation
        self.completion: Completion | None = None
        self._request = request
        self._seen = len(request.prompt_ids)
        self._text: list[str] = []
        self._tokenizer = model.tokenizer
        self._stream = None
        if model.tokenizer is not None:
            self._stream = TextStream(
                model.tokenizer,
                prompt_ids=() if as_reply else request.prompt_ids,
                stops=tuple(request.params.stop),
            )

    def advance(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        finish: np.ndarray,
        details: Callable[[], _Details],
    ) -> Delta | None:
        """What is new since the last look, or None if nothing is.

        `details` brings log-probabilities and statistics over, for a row that is done.
        """
        prompt_len = len(self._request.prompt_ids)
        length, code = int(lengths[self.index]), Finish(int(finish[self.index]))
        reason = _REASONS.get(code)
        if length == self._seen and reason is None:
            return None
        new = tokens[self.index, self._seen : length].tolist()
        text = ""
        if self._tokenizer is not None and reason == "eos":
            stops = tuple(self._request.params.stop)
            last = self._tokenizer.id_to_token(new[-1])
            reason = "stop" if last in stops else reason  # a stop string that is a special token
        if self._stream is not None:
            delta = self._stream.push(new[:-1] if code == Finish.EOS else new)
            text = delta.text
            if not delta.finished and reason is not None:
                delta = self._stream.flush()
                text += delta.text
            if delta.stop is not None:
                reason, length = "stop", prompt_len + delta.num_tokens
        new = new[: length - self._seen]
        self._seen = length
        self._text.append(text)
        if reason is not None:
            logprobs, stats, lookups = details()
            counts = None
            if self._speculation is not None and stats is not None:
                span = slice(prompt_len, length)
                counts = count_speculation(stats, lookups, self.index, span, self._speculation)
            self.completion = Completion(
                text="".join(self._text),
                token_ids=tuple(tokens[self.index, prompt_len:length].tolist()),
                finish_reason=reason,
                prompt_tokens=prompt_len,
                seed=self._request.seed,
                logprobs=self._logprobs(tokens, logprobs, length),
                speculation=counts,
            )
        return Delta(row=self.index, text=text, token_ids=tuple(new), completion=self.completion)

    def _logprobs(
        self, tokens: np.ndarray, logprobs: Logprobs | None, length: int
    ) -> tuple[TokenLogprobs, ...] | None:
        num_top = self._request.params.logprobs
        if logprobs is None or num_top is None:
            return None
        span = slice(len(self._request.prompt_ids), length)
        top_ids = np.asarray(logprobs.top_ids)[self.index, span, :num_top].tolist()
        top = np.asarray(logprobs.top)[self.index, span, :num_top].tolist()
        chosen = np.asarray(logprobs.chosen)[self.index, span].tolist()
        return tuple(
            TokenLogprobs(token_id=token, logprob=value, top=tuple(zip(ids, values, strict=True)))
            for token, value, ids, values in zip(
                tokens[self.index, span].tolist(), chosen, top_ids, top, strict=True
            )
        )
