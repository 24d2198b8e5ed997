"""The engine on the GPU: the tokens that it emits on a CPU, whatever the method."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bench.first_light.decoding import random_model
from ssd_jax import SSD, Completion, Model, NgramConfig, SamplingParams, Speculation, generate
from ssd_jax.cli.compile_clock import CompileClock
from ssd_jax.engine.batch import make_requests
from ssd_jax.generation import choose_method
from ssd_jax.model import DTypeName, demo_folder, load_model
from ssd_jax.placement import place_model

PROMPTS = (
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "# Sort a list of words by their length\n",
    "Once upon a time",
)
TINY_PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 1])
DRAFT_LEN = 4

type Tell = Callable[..., None]


def tokens(*, tell: Tell, dry_run: bool) -> None:
    """Greedy tokens in float32 by every method: those of plain decoding on the CPU."""
    params, prompts = _params(dry_run), _prompts(dry_run)
    target, draft = _pair("float32", dry_run)
    cpu = jax.devices("cpu")[0]
    expected = generate(place_model(target, cpu), prompts, params)
    with _kernels_used() as used:
        for name, method in _methods(draft).items():
            found = generate(target, prompts, params, speculation=method)
            tell(name, *_verdict(found, expected))
    tell("kernels", ", ".join(sorted(used)), detail=True)


def exact(*, tell: Tell, dry_run: bool) -> None:
    """Bfloat16: under `exact` speculation is bit for bit plain decoding of the same width."""
    params, prompts = dataclasses.replace(_params(dry_run), logprobs=1), _prompts(dry_run)
    target, draft = _pair("bfloat16", dry_run)
    with _kernels_used() as used:
        plain = generate(target, prompts, params)
        wide = generate(
            target, prompts, params, speculation=Speculation(draft_len=DRAFT_LEN, exact=True)
        )
        speculated = generate(
            target,
            prompts,
            params,
            speculation=Speculation(draft=draft, draft_len=DRAFT_LEN, exact=True),
        )
        figure, same = _verdict(speculated, wide)
        bits = all(
            [one.logprob for one in a.logprobs or ()] == [one.logprob for one in b.logprobs or ()]
            for a, b in zip(speculated, wide, strict=True)
        )
        tell(
            "draft, exact", f"{figure}; log-probabilities {'equal' if bits else 'differ'}", ok=same
        )
        for name, method in ({} if dry_run else _methods(draft)).items():
            found = generate(target, prompts, params, speculation=method)
            # Ties of bfloat16 logits may fall otherwise in passes of another width.
            tell(f"{name}, not exact", _verdict(found, plain)[0])
    tell("kernels", ", ".join(sorted(used)))


def split(*, tell: Tell, dry_run: bool) -> None:
    """SSD with the target on the GPU and the draft on the host: same tokens, nothing moved unasked.

    After a first run nothing compiles, and rounds pass under a transfer guard.
    """
    params, prompts = _params(dry_run), _prompts(dry_run)
    target, draft = _pair("float32", dry_run)
    cpu = jax.devices("cpu")[0]
    expected = generate(place_model(target, cpu), prompts, params)
    ssd = SSD(draft=place_model(draft, cpu), draft_len=3, fan_out=3)
    found = generate(target, prompts, params, speculation=ssd)
    tell("tokens", *_verdict(found, expected))
    with CompileClock() as clock:
        generate(target, prompts, params, speculation=ssd)
    tell("compiled again", f"{clock.seconds:.3f} s", ok=clock.seconds == 0)
    method, batch = choose_method(target, make_requests(target, prompts, params), ssd)
    run = method.advance(batch, method.prefill(batch), 1)
    with jax.transfer_guard("disallow"):
        run = method.advance(batch, run, 200)
    state, _, _ = method.view(run)
    output = np.asarray(state.tokens)
    same = all(
        tuple(output[row, start : start + len(one.token_ids)].tolist()) == one.token_ids
        for row, (start, one) in enumerate(zip(batch.lengths.tolist(), expected, strict=False))
    )
    tell("under a transfer guard", "same tokens" if same else "other tokens", ok=same)
    counts = found[0].speculation
    if counts is not None and counts.lookups is not None:
        tell("hits", f"{sum(counts.lookups.hits)} of {sum(counts.lookups.lookups)} lookups")


def _params(dry_run: bool) -> SamplingParams:
    return SamplingParams(max_tokens=24 if dry_run else 128, seed=0)


def _prompts(dry_run: bool) -> Sequence[str | Sequence[int]]:
    return TINY_PROMPTS if dry_run else PROMPTS


def _pair(dtype: DTypeName, dry_run: bool) -> tuple[Model, Model]:
    """The demo pair; in a dry run tiny random models, which compile in a fraction of the time."""
    if dry_run:
        return random_model("tiny", dtype=dtype), random_model("tiny draft", seed=1, dtype=dtype)
    target, draft = (load_model(demo_folder(role), dtype) for role in ("target", "draft"))
    return target, draft


def _methods(draft: Model) -> dict[str, Speculation | SSD | None]:
    ngram = NgramConfig(max_draft=8)  # each width of a pass is compiled
    return {
        "plain": None,
        "draft": Speculation(draft=draft, draft_len=DRAFT_LEN),
        "n-gram": Speculation(ngram=ngram),
        "combined": Speculation(draft=draft, draft_len=DRAFT_LEN, ngram=ngram),
        "SSD": SSD(draft=draft, draft_len=3, fan_out=3),
    }


def _verdict(found: Sequence[Completion], expected: Sequence[Completion]) -> tuple[str, bool]:
    """How many tokens of each output are the expected ones, and whether all are."""
    agreeing = []
    for one, other in zip(found, expected, strict=True):
        same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=False)]
        agreeing.append(next((at for at, equal in enumerate(same) if not equal), len(same)))
    equal = [one.token_ids == other.token_ids for one, other in zip(found, expected, strict=True)]
    count = sum(len(one.token_ids) for one in expected)
    figure = f"{sum(equal)} of {len(equal)} outputs equal ({count} tokens)"
    if not all(equal):
        figure += f", the others from token {agreeing} on"
    return figure, all(equal)


@contextlib.contextmanager
def _kernels_used() -> Iterator[set[str]]:
    """The implementations that ops choose meanwhile, as `op: name`."""
    used: set[str] = set()

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments: Any = record.args
            used.add(f"{arguments[0]}: {arguments[1]}")

    logger, note = logging.getLogger("pallas_kernels.ops"), Note()
    level = logger.level
    logger.addHandler(note)
    logger.setLevel(logging.DEBUG)
    try:
        yield used
    finally:
        logger.removeHandler(note)
        logger.setLevel(level)
