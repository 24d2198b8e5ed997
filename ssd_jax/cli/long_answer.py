"""Output of unknown length, decoded in stages, so that no cache is as long as the whole context."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import MemoryBudgetError
from ssd_jax.generation import Completion, Delta, stream
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.text import TextStream

FIRST_STAGE = 512  # tokens; each stage is twice as long as the one before


def stream_answer(
    model: Model,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    speculation: Speculation | SSD | None,
    *,
    as_reply: bool = False,
) -> Iterator[Delta]:
    """One output piece by piece, the last piece with its completion; without limit in stages.

    A stage goes on from prompt and output of those before it. Randomness hangs on a token's
    position, so the tokens are those of one long run (under verification "rejection": others of
    their law). Penalties that count what was emitted would not see the earlier stages: with them,
    and with log-probabilities, there is one stage, and a cache for all of the context. Where the
    cache of a later stage does not fit the memory, the output ends, by "length".
    `as_reply` is as in `generation.stream`.

    Raises:
        SsdJaxError: as `generation.stream`.
    """
    room = model.config.max_context - len(prompt_ids)
    is_bounded = params.max_tokens is not None or room <= FIRST_STAGE
    counts_output = params.presence_penalty or params.frequency_penalty
    if is_bounded or counts_output or params.logprobs is not None:
        return stream(model, [prompt_ids], params, speculation=speculation, as_reply=as_reply)
    return _in_stages(model, tuple(prompt_ids), params, speculation, room, as_reply=as_reply)


def _in_stages(
    model: Model,
    prompt_ids: tuple[int, ...],
    params: SamplingParams,
    speculation: Speculation | SSD | None,
    room: int,
    *,
    as_reply: bool,
) -> Iterator[Delta]:
    text = None
    if model.tokenizer is not None:  # one for all stages: characters and stop strings may span two
        stops = tuple(params.stop)
        before = () if as_reply else prompt_ids
        text = TextStream(model.tokenizer, prompt_ids=before, stops=stops)
    texts: list[str] = []
    ids: tuple[int, ...] = ()
    stages: list[Completion] = []

    def ended(reason: str) -> Completion:
        return _joined(stages, "".join(texts), ids, len(prompt_ids), reason)

    def held() -> str:
        texts.append("" if text is None else text.flush().text)
        return texts[-1]

    size = FIRST_STAGE
    while True:
        staged = dataclasses.replace(params, max_tokens=min(size, room - len(ids)))
        pieces = stream(
            model,
            [(*prompt_ids, *ids)],
            staged,
            speculation=speculation,
            as_reply=as_reply and not ids,
        )
        while True:
            try:
                delta = next(pieces)
            except MemoryBudgetError:
                if not stages:
                    raise
                piece = held()
                yield Delta(row=0, text=piece, token_ids=(), completion=ended("length"))
                return
            new, stop = delta.token_ids, None
            reason = None if delta.completion is None else delta.completion.finish_reason
            if delta.completion is not None:
                stages.append(delta.completion)
            if text is not None:
                pushed = text.push(new[:-1] if reason == "eos" else new)
                texts.append(pushed.text)
                if (stop := pushed.stop) is not None:
                    new, reason = new[: pushed.num_tokens - len(ids)], "stop"
            ids += new
            piece = texts[-1] if texts else ""
            if reason is not None and (stop or reason != "length" or len(ids) == room):
                piece += held()
                yield Delta(row=0, text=piece, token_ids=new, completion=ended(reason))
                return
            yield Delta(row=0, text=piece, token_ids=new, completion=None)
            if reason is not None:
                break
        size *= 2


def _joined(
    stages: Sequence[Completion], text: str, ids: tuple[int, ...], prompt_tokens: int, reason: str
) -> Completion:
    """One completion of all stages; a stage within which a stop string ended has no counts."""
    last = stages[-1]
    counts = [stage.speculation for stage in stages]
    return dataclasses.replace(
        last,
        text=text,
        token_ids=ids,
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        speculation=functools.reduce(_added, counts),
    )


def _added(one: Any, other: Any) -> Any:  # noqa: ANN401 (counts of any shape, the same for both)
    """Counts added number by number."""
    if one is None:
        return None
    if isinstance(one, int):
        return one + other
    if isinstance(one, dict):
        return {name: _added(entry, other[name]) for name, entry in one.items()}
    if isinstance(one, tuple):
        return tuple(map(_added, one, other))
    names = [field.name for field in dataclasses.fields(one)]
    return dataclasses.replace(
        one, **{name: _added(getattr(one, name), getattr(other, name)) for name in names}
    )
