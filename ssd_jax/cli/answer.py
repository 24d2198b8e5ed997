"""One output of the command line: decoded, printed as it comes, timed."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

from ssd_jax.cli.compile_clock import CompileClock, showing_compilation
from ssd_jax.cli.long_answer import stream_answer
from ssd_jax.cli.notes import note, terminal_width
from ssd_jax.cli.word_wrap import WordWrap
from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import RequestError
from ssd_jax.generation import Completion
from ssd_jax.json_text import to_json
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams

INTERRUPTED = "interrupted"
_ENDINGS = {
    "eos": "stopped by end of text",
    "stop": "stopped by stop string",
    "length": "stopped by length",
    "error": "stopped by logits that are not finite or leave no token possible",
    INTERRUPTED: INTERRUPTED,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds, compilation taken out of all but `compile_s`.

    Attributes:
        first_token_s: from the request to its first token.
        decode_s: from the first token to the last.
        compile_s: tracing, lowering, and compiling or fetching compiled programs.
        tokens_per_s: tokens after the first over `decode_s`; None if there are none.
    """

    first_token_s: float | None
    decode_s: float
    compile_s: float
    tokens_per_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one prompt; without a completion if the user interrupted it."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion: Completion | None
    timings: Timings

    @property
    def finish_reason(self) -> str:
        """As in `Completion`, or "interrupted"."""
        return INTERRUPTED if self.completion is None else self.completion.finish_reason


def print_answer(
    model: Model,
    speculation: Speculation | SSD | None,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    args: argparse.Namespace,
    *,
    wrap: bool = False,
    as_reply: bool = False,
) -> Answer:
    """The answer to one prompt, after it is printed as the arguments ask; statistics to stderr.

    With `wrap` lines are broken at words, if stdout is a terminal. `as_reply` says that the output
    is a text by itself, which does not continue the prompt's.
    """
    streaming = args.stream and not args.json
    wrapped = WordWrap(terminal_width) if wrap and sys.stdout.isatty() else None

    def write(text: str) -> None:
        print(text if wrapped is None else wrapped.push(text), end="", flush=True)

    show = write if streaming else _drop
    with showing_compilation(show, quiet=args.quiet) as show:
        answer = _decode(model, speculation, prompt_ids, params, show, as_reply=as_reply)
    if args.json:
        print(to_json(_as_json(answer, params)), flush=True)
    else:
        write("" if streaming else answer.text)
        print("" if wrapped is None else wrapped.flush(), flush=True)
    if not args.quiet:
        note(_statistics(answer))
    return answer


def refuse_failed(answer: Answer) -> None:
    """Raise, after what came was printed, if the model could not go on.

    Raises:
        RequestError: the answer ended by "error".
    """
    if answer.finish_reason == "error":
        raise RequestError(
            f"Expected finite logits with a possible token after {len(answer.token_ids)} tokens of "
            "output, got NaN, infinity or none; check the weights, try --dtype float32, or loosen "
            "--logit-bias."
        )


def _decode(
    model: Model,
    speculation: Speculation | SSD | None,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    write: Callable[[str], None],
    *,
    as_reply: bool,
) -> Answer:
    """The answer to one prompt, each piece of its text passed on; Ctrl-C ends it early."""
    texts: list[str] = []
    token_ids: list[int] = []
    completion = first = None
    with CompileClock() as clock:
        start = time.perf_counter()
        try:
            for delta in stream_answer(model, prompt_ids, params, speculation, as_reply=as_reply):
                if first is None:
                    first = time.perf_counter() - clock.seconds
                texts.append(delta.text)
                token_ids += delta.token_ids
                completion = delta.completion
                write(delta.text)
        except KeyboardInterrupt:
            pass
        end = time.perf_counter() - clock.seconds
    decode_s = 0.0 if first is None else end - first
    more = len(token_ids) - 1
    return Answer(
        text="".join(texts),
        token_ids=tuple(token_ids),
        prompt_tokens=len(prompt_ids),
        completion=completion,
        timings=Timings(
            first_token_s=None if first is None else first - start,
            decode_s=decode_s,
            compile_s=clock.seconds,
            tokens_per_s=more / decode_s if more > 0 and decode_s > 0 else None,
        ),
    )


def _drop(text: str) -> None:
    """Text that is printed at the end goes nowhere until then."""


def _as_json(answer: Answer, params: SamplingParams) -> dict[str, object]:
    account: dict[str, object] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": len(answer.token_ids),
        },
        "seed": params.seed,
        "timings": dataclasses.asdict(answer.timings),
    }
    if answer.completion is not None and answer.completion.logprobs is not None:
        account["logprobs"] = [dataclasses.asdict(entry) for entry in answer.completion.logprobs]
    if answer.completion is not None and answer.completion.speculation is not None:
        counts = answer.completion.speculation
        figures: dict[str, object] = {
            "target_steps": counts.target_steps,
            "tokens_per_target_step": len(answer.token_ids) / max(1, counts.target_steps),
            "drafters": {
                name: {**dataclasses.asdict(own), "acceptance_rate": own.acceptance_rate}
                for name, own in counts.drafters.items()
            },
        }
        if counts.lookups is not None:
            hit_rate = counts.lookups.hit_rate
            figures["lookups"] = {**dataclasses.asdict(counts.lookups), "hit_rate": hit_rate}
        account["speculation"] = figures
    return account


def _statistics(answer: Answer) -> str:
    """The last line: tokens, speed, waiting and compiling, why it ended."""
    timings, number = answer.timings, len(answer.token_ids)
    parts = [f"{number} token{'s' if number != 1 else ''}"]
    if timings.tokens_per_s is not None:
        parts.append(f"{timings.tokens_per_s:,.0f} tokens/s")
    waited = "no token yet"
    if timings.first_token_s is not None:
        waited = f"first token after {timings.first_token_s:.2f} s"
    parts.append(f"{waited} (+ {timings.compile_s:.1f} s compiling)")
    parts.append(_ENDINGS[answer.finish_reason])
    counts = None if answer.completion is None else answer.completion.speculation
    if counts is not None:
        parts += [
            f"{own.num_accepted_tokens} of {own.num_draft_tokens} tokens drafted by {name} "
            f"accepted ({own.acceptance_rate:.0%})"
            for name, own in counts.drafters.items()
        ]
        parts.append(f"{number / max(1, counts.target_steps):.2f} tokens a target step")
        if counts.lookups is not None:
            parts.append(f"{counts.lookups.hit_rate:.0%} of outcomes were prepared")
    return ", ".join(parts)
