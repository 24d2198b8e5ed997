"""Cost of n-gram drafting per round, at a short and a long context.

    python bench/ngram_cost.py [--contexts 1024 32768] [--batch 1 8] [--draft 16]

A round drafts, appends one token and learns it, as a decode loop does in which every draft is
rejected; the update is as wide as a full draft and its bonus token. Rounds run in one program on
the device, with buffers of the context's size. The text repeats passages of itself, so that most
rounds find a draft. Medians over interleaved repeats, in microseconds a round; a round is at least
one token a row. `empty` is the same loop without drafting. One JSON record on stdout.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ssd_jax.drafting.ngram import (
    NgramConfig,
    draft_ngram,
    init_ngram,
    learn_prompt,
    update_ngram,
)
from ssd_jax.json_text import to_json

ROUNDS = 512


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Cost of n-gram drafting by context length.")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--draft", type=int, default=16, help="most tokens in a draft (16)")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats (9)")
    args = parser.parse_args()
    kinds = {
        "empty": None,
        "simple": NgramConfig(kind="simple", max_draft=args.draft),
        "map": NgramConfig(kind="map", max_draft=args.draft),
        "mod": NgramConfig(kind="mod", max_draft=args.draft),
    }
    contenders = {
        (name, batch_size, context): prepare(config, batch_size, context)
        for name, config in kinds.items()
        for batch_size in args.batch
        for context in args.contexts
    }
    seconds: dict[tuple[str, int, int], list[float]] = {key: [] for key in contenders}
    drafted = {key: run()[1] for key, run in contenders.items()}
    for _ in range(args.repeats):
        for key, run in contenders.items():
            seconds[key].append(run()[0])
    records = [
        {
            "kind": name,
            "batch": batch_size,
            "context": context,
            "microseconds_per_round": round(statistics.median(values) * 1e6, 1),
            "min_max": [round(min(values) * 1e6, 1), round(max(values) * 1e6, 1)],
            "drafted_per_round_and_row": round(drafted[name, batch_size, context], 2),
        }
        for (name, batch_size, context), values in seconds.items()
    ]
    device = jax.devices()[0].device_kind
    print(to_json({"device": device, "max_draft": args.draft, "cost": records}, indent=2))


def prepare(
    config: NgramConfig | None, batch_size: int, context: int
) -> Callable[[], tuple[float, float]]:
    """A function that runs ROUNDS rounds: seconds a round, and tokens drafted a round and row."""
    slots = context + ROUNDS
    tokens = np.stack([repetitive_text(seed, slots) for seed in range(batch_size)])
    tokens = jnp.asarray(tokens)
    lengths = jnp.full(batch_size, context, jnp.int32)
    start = None
    if config is not None:
        state = init_ngram(config, batch_size, slots)
        start = jax.jit(learn_prompt, static_argnums=0)(config, state, tokens, lengths)

    def run() -> tuple[float, float]:
        state = jax.block_until_ready(jax.tree.map(jnp.copy, start))
        began = time.perf_counter()
        _, _, count = jax.block_until_ready(rounds(config, state, tokens, lengths))
        took = time.perf_counter() - began
        return took / ROUNDS, int(count) / ROUNDS / batch_size

    return run


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def rounds(config, state, tokens, lengths):  # noqa: ANN001, ANN201
    """State, checksum and number of all drafted tokens after ROUNDS rounds."""

    def advance(_, carry):  # noqa: ANN001, ANN202
        state, lengths, checksum, count = carry
        if config is not None:
            draft = draft_ngram(config, state, tokens, lengths)
            checksum += jnp.sum(draft.tokens)
            count += jnp.sum(draft.count)
            # Nothing is added, but the update has to wait for the draft, as in decoding, where the
            # new tokens come of it. Were they unordered, the compiler would copy the tables.
            known = lengths + (draft.tokens[:, 0] < 0).astype(jnp.int32)
            width = config.max_draft + 1
            state = update_ngram(config, state, tokens, known, lengths + 1, width=width)
        return state, lengths + 1, checksum, count

    carry = (state, lengths, jnp.int32(0), jnp.int32(0))
    state, _, checksum, count = jax.lax.fori_loop(0, ROUNDS, advance, carry)
    return state, checksum, count


def repetitive_text(seed: int, length: int) -> np.ndarray:
    """Random tokens in which every other passage of 64 repeats an earlier one."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 32_000, 64, np.int32)
    while len(text) < length:
        source = rng.integers(0, len(text) - 63)
        text = np.concatenate(
            [text, text[source : source + 64], rng.integers(0, 32_000, 64, np.int32)]
        )
    return text[:length]


if __name__ == "__main__":
    main()
