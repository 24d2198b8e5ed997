"""What tests of SSD share: one small pair of models, so that few programs serve all of them.

Every batch has four rows, asks for log-probabilities, and fits the same 128 slots: the context is
shorter than that by just the longest draft.
"""

import dataclasses
import functools

import jax
import numpy as np
from speculation_cases import DRAFT_LEN, OPTIONS
from tiny_models import CONFIGS, TinyModel, make_tiny, perturbed, tiny_tokenizer

from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.engine.ssd import speculative_speculative
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.fan_out import FanOut
from ssd_jax.model import Model

CONTEXT = 124
CONFIG = dataclasses.replace(CONFIGS["qwen3"], num_layers=1, max_context=CONTEXT)
GOOD, FAIR, BAD = 0.0, 0.15, 3.0  # noise on the draft's weights; 0 is the target itself
FAN_OUT = FanOut(after_hit=(3, 2, 2, 1, 2), after_miss=(4, 1, 0, 2, 1))
LONG = [
    dataclasses.replace(params, max_tokens=40 + row, logprobs=3)
    for row, params in enumerate(OPTIONS)
]


@functools.cache
def target() -> Model:
    """The target, with a tokenizer."""
    return dataclasses.replace(make_tiny(CONFIG).model, tokenizer=tiny_tokenizer())


@functools.cache
def draft(scale: float) -> Model:
    """The target with noise of that scale on its weights."""
    return perturbed(target(), scale)


@functools.cache
def naive_draft(scale: float) -> TinyModel:
    """The draft as the tests' own computation knows it."""
    params = draft(scale).params
    weights = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
    return TinyModel(config=CONFIG, params=params, weights=weights)


def ssd(scale: float = FAIR, **options) -> SSD:
    """The options most tests share, with changes."""
    usual = {"draft_len": DRAFT_LEN, "fan_out": FAN_OUT}
    return SSD(draft=draft(scale), **{**usual, **options})


def hit_rate(completions) -> float:
    """Outcomes found over outcomes looked up, all rows together."""
    counts = [completion.speculation.lookups for completion in completions]
    return sum(sum(c.hits) for c in counts) / sum(sum(c.lookups) for c in counts)


def begin(model: Model, options: SSD, prompts, params):
    """A decoding driven by hand: its method, its batch and its first state."""
    method = speculative_speculative(model, options)
    requests = make_requests(model, prompts, params)
    batch = make_batch(model, requests, options.draft_len, options)
    return method, batch, method.prefill(batch)


def snapshot(run):
    """A state as numpy arrays (the state itself is given away to the next round)."""
    return dataclasses.replace(
        run,
        target=jax.device_get(run.target),
        stats=jax.device_get(run.stats),
        speculator=jax.device_get(run.speculator),
        outcome=np.asarray(run.outcome),
        last_outcome=None,
    )


def rounds(model: Model, options: SSD, prompts, params):
    """Snapshots after each round, up to the round after the last row ended."""
    method, batch, run = begin(model, options, prompts, params)
    seen = [snapshot(run)]
    while not seen[-1].speculator.text.finish.all():
        run = method.advance(batch, run, 1)
        seen.append(snapshot(run))
    return seen
