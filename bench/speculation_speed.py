"""Decoding methods on the same prompts in one run: tokens/s as ratios to plain decoding.

    python bench/speculation_speed.py [--prompts FILE.jsonl[.gz]] [--num-prompts 16] [-k 4]

The demo pair decodes greedily at batch 1, the methods taking turns on every prompt. Time is that of
the whole request after a warm-up (prefill included on every side), every program compiled before.
The outputs are compared token by token: a method that changes one is reported as such. Prompts are
the lines' `prompt` fields; without a file a few are built from the standard library, half of them
copy-heavy (a function to repeat with one name changed).
"""

import argparse
import gzip
import inspect
import json
import statistics
import textwrap
import time
from pathlib import Path

from ssd_jax import Model, NgramConfig, SamplingParams, Speculation, generate, load_model
from ssd_jax.errors import RequestError
from ssd_jax.model import demo_folder


def main() -> None:
    """Measure what the command line asks for; one JSON record on stdout."""
    parser = argparse.ArgumentParser(description="Speed of speculation against plain decoding.")
    parser.add_argument("--prompts", type=Path, help="JSON Lines with a `prompt` field")
    parser.add_argument("--num-prompts", type=int, default=16, help="how many to use (16)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens an answer (128)")
    parser.add_argument("-k", "--draft-len", type=int, nargs="+", default=[4], help="drafted (4)")
    parser.add_argument("--rounds", type=int, default=3, help="times each prompt is run (3)")
    args = parser.parse_args()
    target, draft = load_model(), load_model(demo_folder("draft"))
    methods: dict[str, Speculation | None] = {"ar": None}
    for length in args.draft_len:
        methods[f"draft k={length}"] = Speculation(draft=draft, draft_len=length)
    methods["ngram simple"] = Speculation(ngram=NgramConfig(kind="simple"))
    methods["ngram mod"] = Speculation(ngram=NgramConfig(kind="mod"))
    prompts = read_prompts(args.prompts) if args.prompts else own_prompts()
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)
    usable = [p for p in prompts if fits(target, p, args.max_tokens)][: args.num_prompts]
    print(json.dumps(measure(target, methods, usable, params, args.rounds), indent=2))


def measure(
    target: Model,
    methods: dict[str, Speculation | None],
    prompts: list[str],
    params: SamplingParams,
    rounds: int,
) -> dict[str, object]:
    """Seconds of every method on every prompt, taken in turns, and what was accepted."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    accepted, drafted, steps, differing = (dict.fromkeys(methods, 0) for _ in range(4))
    num_tokens = 0
    for prompt in prompts:
        times: dict[str, list[float]] = {name: [] for name in methods}
        plain = None
        for turn in range(rounds + 1):  # the first compiles
            for name, speculation in methods.items():
                started = time.perf_counter()
                (completion,) = generate(target, [prompt], params, speculation=speculation)
                if turn:
                    times[name].append(time.perf_counter() - started)
                    continue
                plain = plain or completion
                differing[name] += completion.token_ids != plain.token_ids
                if completion.speculation is not None:
                    accepted[name] += completion.speculation.accepted
                    drafted[name] += completion.speculation.drafted
                    steps[name] += completion.speculation.target_steps
                else:
                    num_tokens += len(completion.token_ids)
        for name, values in times.items():
            seconds[name].append(statistics.median(values))
    total = {name: sum(values) for name, values in seconds.items()}
    return {
        "prompts": len(prompts),
        "tokens_a_method": num_tokens,
        "methods": {
            name: {
                "tokens_per_s": num_tokens / total[name],
                "ratio_to_ar": total["ar"] / total[name],
                "ratio_by_prompt_min_median_max": spread(
                    [a / b for a, b in zip(seconds["ar"], seconds[name], strict=True)]
                ),
                "acceptance_rate": accepted[name] / drafted[name] if drafted[name] else None,
                "tokens_a_target_step": num_tokens / steps[name] if steps[name] else 1.0,
                "outputs_that_differ": differing[name],
            }
            for name in methods
        },
    }


def spread(values: list[float]) -> list[float]:
    """Minimum, median and maximum."""
    return [min(values), statistics.median(values), max(values)]


def fits(model: Model, prompt: str, max_tokens: int) -> bool:
    """Whether a prompt and its answer fit the model's context."""
    if model.tokenizer is None:
        raise RequestError("The demo target should have a tokenizer; reinstall the package.")
    return len(model.tokenizer.encode(prompt)) + max_tokens <= model.config.max_context


def read_prompts(path: Path) -> list[str]:
    """The `prompt` field of every line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def own_prompts() -> list[str]:
    """Functions of the standard library: to be continued, and to be repeated with a new name."""
    prompts = []
    for function in (textwrap.wrap, textwrap.dedent, textwrap.indent, statistics.median):
        source = inspect.getsource(function)
        prompts.append(source[: len(source) // 2])
        prompts.append(f"{source}\n\n{source}\n\ndef renamed_{source[4:40]}")
    return prompts


if __name__ == "__main__":
    main()
