"""`ssd-jax bench micro`: what the parts of a round cost by themselves.

    ssd-jax bench micro --out micro.json
    ssd-jax bench micro --parts verify tree --model DIR --draft-model DIR

    verify     a pass of the target against how many tokens it judges
    tree       preparing drafts (draft_len 3) against how many branches there are
    propose    what the target waits for between two verifications: a hit, a miss
    lookup     finding the outcome among so many prepared ones
    dispatch   starting a program that adds one, by how many arrays it takes
    move       a number between host and device, and between target and draft if they lie apart
    sampling   one token of 128 k logits, by what is asked for
    ngram      an n-gram draft at a context of 32 k tokens, by kind

Contestants take turns; medians and extremes are over the turns. In a turn each runs many times
between two looks at the clock, so that waiting for it counts little.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arguments import make_parser, read_arguments
from bench.micro_parts import PARTS, Pair, Part
from bench.record import environment, write_record
from ssd_jax import load_model, place_model, split_cpu
from ssd_jax.cli.busy import busy
from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.cli.flags import add_device_flags, add_model_flags
from ssd_jax.cli.parser import whole_number
from ssd_jax.engine.speculation import check_pair
from ssd_jax.errors import RequestError
from ssd_jax.model import demo_folder

SCHEMA = 1  # of the record; raised when a field changes its meaning


def main(argv: Sequence[str]) -> int:
    """Measure what the command line asks for; the exit code."""
    args = _arguments(argv)
    if args.rounds < 1:
        raise RequestError(f"--rounds must be at least 1, got {args.rounds}.")
    if args.model and not args.draft_model:
        raise RequestError("A --model of your own needs --draft-model as well.")
    use_compilation_cache(args.compilation_cache)
    draft_device = split_cpu()[1] if args.split else None
    with busy("loading the models", quiet=False):
        target = load_model(args.model, args.dtype)
        draft = load_model(args.draft_model or demo_folder("draft"), args.dtype)
    check_pair(target, draft)
    if draft_device is not None:
        draft = place_model(draft, draft_device)
    pair = Pair(target=target, draft=draft, turns=args.rounds + 1)
    parts = {}
    for name in args.parts:
        print(f"{name} ...", file=sys.stderr)
        parts[name] = measure_part(PARTS[name](pair), args.rounds)
    record: dict[str, Any] = {
        "kind": "micro",
        "schema": SCHEMA,
        "environment": environment(),
        "model": args.model or "demo",
        "draft_model": args.draft_model or "demo",
        "rounds": args.rounds,
        "parts": parts,
    }
    write_record(record, Path(args.out) if args.out else None)
    return 0


def measure_part(part: Part, rounds: int) -> dict[str, Any]:
    """Median and extremes of each contestant's seconds, after a turn that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in part.contestants}
    for turn in range(rounds + 1):
        for name, run in part.contestants.items():
            took = run()
            if turn > 0:
                seconds[name].append(took)
    results = [
        {
            "at": name,
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
        }
        for name, values in seconds.items()
    ]
    return {"what": part.what, "axis": part.axis, "results": results}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("micro", "What the parts of a round cost by themselves: one JSON record.")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=tuple(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number,
        default=7,
        metavar="N",
        help="turns of each contestant (default: 7)",
    )
    parser.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="half of the CPU's cores for the target, half for the draft (default: no)",
    )
    parser.add_argument("--out", metavar="FILE", help="the record (default: stdout)")
    models = parser.add_argument_group("models")
    add_model_flags(models)
    models.add_argument(
        "--draft-model", metavar="DIR", help="the draft's folder (default: the demo draft)"
    )
    add_device_flags(parser.add_argument_group("device"))
    return read_arguments(parser, argv)
