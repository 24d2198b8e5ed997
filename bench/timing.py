"""Seconds of a request's parts: prefill, first step, the rest of decoding, and the host's share."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

from ssd_jax import SSD, Model, SamplingParams, Speculation, generate, stream
from ssd_jax.decoding.finish import Finish
from ssd_jax.engine.batch import make_requests
from ssd_jax.generation import choose_method

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one batch of requests, decoded on the device without the host looking.

    Attributes:
        prefill_s: the prompts through every model, and n-gram tables filled.
        first_step_s: the first step or round, until the host has its tokens.
        decode_s: everything after prefill, `first_step_s` included.
        decode_cpu_s: processor seconds of all threads in that time, on which other processes of a
            busy machine tell less; says nothing where an accelerator does the work.
    """

    prefill_s: float
    first_step_s: float
    decode_s: float
    decode_cpu_s: float

    @property
    def first_token_s(self) -> float:
        """Until the first token is there; making the batch from text is not counted."""
        return self.prefill_s + self.first_step_s


def time_parts(
    model: Model,
    prompts: Prompts,
    params: Sequence[SamplingParams],
    speculation: Speculation | SSD | None,
) -> Timing:
    """Seconds of one run whose programs are compiled already."""
    requests = make_requests(model, prompts, params)
    method, batch = choose_method(model, requests, speculation)
    started = time.perf_counter()
    state = jax.block_until_ready(method.prefill(batch))
    prefilled, prefilled_cpu = time.perf_counter(), time.process_time()
    state = method.advance(batch, state, 1)
    jax.device_get(method.view(state)[0].tokens)
    first = time.perf_counter()
    jax.block_until_ready(method.advance(batch, state, batch.max_steps))
    done, done_cpu = time.perf_counter(), time.process_time()
    return Timing(
        prefill_s=prefilled - started,
        first_step_s=first - prefilled,
        decode_s=done - prefilled,
        decode_cpu_s=done_cpu - prefilled_cpu,
    )


def time_deliveries(
    model: Model,
    prompts: Prompts,
    params: Sequence[SamplingParams],
    speculation: Speculation | SSD | None,
) -> list[tuple[float, int]]:
    """Seconds and new tokens (of all rows) of each step or round, the host looking after each.

    That is what a reader sees to whom every round is shown at once.
    """
    requests = make_requests(model, prompts, params)
    method, batch = choose_method(model, requests, speculation)
    state = jax.block_until_ready(method.prefill(batch))
    seen = int(batch.lengths.sum())
    deliveries = []
    running, before = True, time.perf_counter()
    while running:
        state = method.advance(batch, state, 1)
        target = method.view(state)[0]
        _, lengths, finish = jax.device_get((target.tokens, target.lengths, target.finish))
        now, known = time.perf_counter(), int(lengths.sum())
        if known > seen:  # the last round of ssd may find that all is said
            deliveries.append((now - before, known - seen))
            before, seen = now, known
        running = bool((finish == Finish.RUNNING).any())
    return deliveries


def time_host(
    model: Model,
    prompts: Prompts,
    params: Sequence[SamplingParams],
    speculation: Speculation | SSD | None,
) -> tuple[float, float]:
    """Seconds of `generate` (one dispatch) and of `stream` (text every few tokens), in turn."""
    return (
        _seconds(lambda: generate(model, prompts, params, speculation=speculation)),
        _seconds(lambda: list(stream(model, prompts, params, speculation=speculation))),
    )


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
