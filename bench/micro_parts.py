"""The parts of a round as contestants to be timed: each a function that takes a turn."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bench import ngram_cost
from ssd_jax import SSD, Model, SamplingParams
from ssd_jax.decoding.ssd import prepare, propose
from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.engine.batch import make_batch, make_requests
from ssd_jax.engine.round_times import measure_pass_times
from ssd_jax.engine.ssd import Run, begin, open_programs
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut
from ssd_jax.placement import home
from ssd_jax.sampling import sample_tokens, warp
from ssd_jax.speculation_cache import look_up, no_prepared_drafts
from ssd_jax.types import PreparedDrafts, Sampling, Verdict

CHAIN = 16  # calls in a turn
LOOPS = 64  # turns of a loop on the device
WIDTHS = (1, 2, 3, 4, 5, 8, 16)
BRANCHES = (1, 4, 8, 16, 64)
LEAVES = (1, 10, 100, 1000)
DRAFT_LEN = 3
VOCABULARY = 128_256  # Llama 3's
CONTEXT = 32_768
PROMPT_LEN = 128

type Seconds = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is measured: in words, what the contestants differ in, and a turn of each of them."""

    what: str
    axis: str
    contestants: Mapping[str, Seconds]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Target and draft, and how many turns there will be (each makes the text longer)."""

    target: Model
    draft: Model
    turns: int


def verify_part(pair: Pair) -> Part:
    """Passes of the target by width, verification and emission included."""
    widest = min(max(WIDTHS), pair.target.config.max_context)

    def run(width: int) -> float:
        return measure_pass_times(pair.target, (width,))[width]

    return Part(
        what="A pass of the target against the tokens that it judges.",
        axis="tokens in the pass",
        contestants={
            str(width): functools.partial(run, width) for width in WIDTHS if width <= widest
        },
    )


def tree_part(pair: Pair) -> Part:
    """Preparing drafts by the number of branches."""

    def contestant(branches: int) -> Seconds:
        ssd, run = _open(pair, (branches, *[0] * DRAFT_LEN))
        state = [run.speculator]

        def link() -> None:
            state[0] = prepare(ssd.speculator, ssd.draft.params, run.draft_sampling, state[0])

        return _chain(link, lambda: state[0])

    most = pair.target.config.vocab_size
    return Part(
        what=f"Preparing drafts of {DRAFT_LEN} tokens against the outcomes that they are for.",
        axis="branches",
        contestants={str(count): contestant(count) for count in BRANCHES if count <= most},
    )


def propose_part(pair: Pair) -> Part:
    """From an outcome at the target to the draft there, with and without a prepared one."""

    def contestant(hit: bool) -> Seconds:
        ssd, run = _open(pair, (1,) * (DRAFT_LEN + 1))
        draft_home, target_home = home(pair.draft), home(pair.target)
        outcome = jax.device_put(np.zeros(run.outcome.shape, np.int32), target_home)
        start = run.speculator
        if hit:  # every branch is for the outcome that is looked up: nothing accepted, then token 0
            found = jax.device_put(
                np.zeros(start.prepared.num_accepted.shape, np.int32), draft_home
            )
            start = dataclasses.replace(
                start, prepared=dataclasses.replace(start.prepared, num_accepted=found)
            )
        state = [start]

        def link() -> None:
            there = jax.device_put(outcome, draft_home)
            state[0], message, law = propose(
                ssd.speculator, ssd.draft.params, run.draft_sampling, state[0], there
            )
            jax.block_until_ready(jax.device_put((message, law), target_home))

        return _chain(link, lambda: state[0])

    return Part(
        what=f"From an outcome on the target's device to a draft of {DRAFT_LEN} tokens there, "
        "waited for each time.",
        axis="outcome",
        contestants={"prepared": contestant(True), "not prepared": contestant(False)},
    )


def lookup_part(pair: Pair) -> Part:
    """Finding an outcome among the prepared ones, on the draft's device alone."""

    def contestant(branches: int) -> Seconds:
        prepared = jax.device_put(
            no_prepared_drafts(1, branches, DRAFT_LEN, 1, with_law=False), home(pair.draft)
        )
        return _loop(lambda: _look_up_often(prepared))

    return Part(
        what="Finding an outcome among the prepared ones, within a program.",
        axis="branches",
        contestants={str(count): contestant(count) for count in BRANCHES},
    )


def dispatch_part(pair: Pair) -> Part:
    """Starting a program by how many arrays it is given."""

    def contestant(leaves: int) -> Seconds:
        arrays = [jax.device_put(np.float32(n), home(pair.target)) for n in range(leaves)]

        def link() -> None:
            arrays[0] = _add_one(arrays)

        return _chain(link, lambda: arrays[0])

    return Part(
        what="Starting a program that adds one to the first of its arguments.",
        axis="arrays",
        contestants={str(count): contestant(count) for count in LEAVES},
    )


def move_part(pair: Pair) -> Part:
    """A number from one place to another and there waited for."""
    target_home, draft_home = home(pair.target), home(pair.draft)
    here = np.zeros(3, np.int32)
    there = jax.block_until_ready(jax.device_put(here, target_home))

    def fetch() -> None:
        jax.device_get(there + 0)  # an array fetched twice comes from the host's copy

    contestants = {
        "host to target": _chain(lambda: jax.block_until_ready(jax.device_put(here, target_home))),
        "target to host, with a sum": _chain(fetch),
    }
    if target_home != draft_home:
        contestants["target to draft"] = _chain(
            lambda: jax.block_until_ready(jax.device_put(there, draft_home))
        )
    return Part(what="Three numbers moved.", axis="way", contestants=contestants)


def sampling_part(pair: Pair) -> Part:
    """One token of many logits, by what is asked for."""
    logits = np.random.default_rng(0).normal(0, 3, (1, VOCABULARY)).astype(np.float32)
    where = home(pair.target)
    kinds = {
        "greedy": {"temperature": 0.0},
        "temperature": {},
        "min-p 0.05": {"min_p": 0.05},
        "top-k 50": {"top_k": 50},
        "top-p 0.9": {"top_p": 0.9},
        "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    }

    def contestant(options: dict[str, float]) -> Seconds:
        sampling = jax.device_put(_sampling(VOCABULARY, options), where)
        start = jax.device_put(logits, where)
        return _loop(lambda: _sample_often(start, sampling))

    return Part(
        what=f"Warping {VOCABULARY} logits and drawing a token, one row.",
        axis="sampling",
        contestants={name: contestant(options) for name, options in kinds.items()},
    )


def ngram_part(pair: Pair) -> Part:
    """An n-gram draft and learning a token, at a long context."""
    del pair
    kinds = {
        "no drafting": None,
        "simple": NgramConfig(kind="simple"),
        "map": NgramConfig(kind="map"),
        "mod": NgramConfig(kind="mod"),
    }

    def contestant(config: NgramConfig | None) -> Seconds:
        run = ngram_cost.prepare(config, 1, CONTEXT)
        return lambda: run()[0]

    return Part(
        what=f"A round of n-gram drafting at a context of {CONTEXT} tokens, one row.",
        axis="kind",
        contestants={name: contestant(config) for name, config in kinds.items()},
    )


PARTS: dict[str, Callable[[Pair], Part]] = {
    "verify": verify_part,
    "tree": tree_part,
    "propose": propose_part,
    "lookup": lookup_part,
    "dispatch": dispatch_part,
    "move": move_part,
    "sampling": sampling_part,
    "ngram": ngram_part,
}


def _open(pair: Pair, fan_out: tuple[int, ...]) -> tuple[SSD, Run]:
    """SSD with this fan-out, some text read, and room for all turns."""
    ssd = SSD(
        draft=pair.draft,
        draft_len=DRAFT_LEN,
        fan_out=FanOut(after_hit=fan_out, after_miss=fan_out),
    )
    room = CHAIN * pair.turns + DRAFT_LEN
    context = pair.target.config.max_context
    if room >= context:
        raise RequestError(
            f"--rounds {pair.turns - 1} needs {room + 1} tokens of context, but the target has "
            f"{context}: lower it."
        )
    prompt = [0] * min(PROMPT_LEN, context - room)
    params = SamplingParams(max_tokens=room, ignore_eos=True)
    requests = make_requests(pair.target, [prompt], params)
    batch = make_batch(pair.target, requests, DRAFT_LEN, ssd)
    return ssd, begin(open_programs(pair.target, ssd), batch)


def _chain(link: Callable[[], object], result: Callable[[], Any] | None = None) -> Seconds:
    """Seconds of one of `CHAIN` calls, the last one's result waited for."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(CHAIN):
            link()
        if result is not None:
            jax.block_until_ready(result())
        return (time.perf_counter() - started) / CHAIN

    return run


def _loop(program: Callable[[], Any]) -> Seconds:
    """Seconds of one turn of a program that turns `LOOPS` times."""

    def run() -> float:
        started = time.perf_counter()
        jax.block_until_ready(program())
        return (time.perf_counter() - started) / LOOPS

    return run


_add_one = jax.jit(lambda arrays: arrays[0] + 1, keep_unused=True)


@jax.jit
def _look_up_often(prepared: PreparedDrafts) -> Int[Array, "B"]:
    """Lookups of which each one asks for what the last one found."""

    def turn(step: Array, bonus_token: Int[Array, "B"]) -> Int[Array, "B"]:
        del step
        verdict = Verdict(num_accepted=jnp.zeros_like(bonus_token), bonus_token=bonus_token)
        hit, branch, tokens, _ = look_up(prepared, verdict)
        return bonus_token + tokens[:, 0] + branch + hit.astype(jnp.int32)

    start = jnp.zeros(prepared.num_accepted.shape[0], jnp.int32)
    return jax.lax.fori_loop(0, LOOPS, turn, start)


@jax.jit
def _sample_often(logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, "B"]:
    """Tokens drawn one after the other, each made a little less likely when it was drawn."""
    counts = jnp.zeros(logits.shape, jnp.int32)
    rows = jnp.arange(len(logits), dtype=jnp.int32)

    def turn(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, total = carry
        positions = jnp.full(len(logits), step, jnp.int32)
        tokens = sample_tokens(warp(logits, sampling, counts), sampling, positions)
        return logits.at[rows, tokens].add(-0.01), total + tokens

    return jax.lax.fori_loop(0, LOOPS, turn, (logits, jnp.zeros_like(rows)))[1]


def _sampling(vocab_size: int, options: Mapping[str, float]) -> Sampling:
    """One row's sampling options as arrays, temperature 0.8 unless told."""
    usual = {
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    values = usual | dict(options)
    return Sampling(
        **{
            name: jnp.array([value], jnp.int32 if name == "top_k" else jnp.float32)
            for name, value in values.items()
        },
        logit_bias=jnp.zeros((1, vocab_size), jnp.float32),
        prompt_tokens=jnp.zeros((1, vocab_size), bool),
        seed=jnp.zeros((1, 2), jnp.uint32),
        eos_ids=jnp.zeros((1, 0), jnp.int32),
        max_length=jnp.full(1, CONTEXT, jnp.int32),
    )
