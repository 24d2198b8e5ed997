r"""`ssd-jax bench run`: decoding methods on the same prompts, compared in one run.

    ssd-jax bench run --out run.json
    ssd-jax bench run --workloads humaneval=HumanEval.jsonl.gz svamp=SVAMP.json.gz chat \
      --methods draft ngram:kind=simple ssd --draft-len 2 4 --fan-out 3 --batch 1 4 --out run.json

The demo pair, or `--model` and `--draft-model`. For the names of methods see `bench/methods.py`,
for the workloads `bench/prompt_sets.py`, for what is recorded `bench/RECORDS.md`. A record with
--out is written after every batch of prompts; the same command goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.arguments import make_parser, read_arguments
from bench.figures import summarise
from bench.measuring import PASSES_BESIDES_ROUNDS, Tell, measure_unit, record_timeline
from bench.methods import DEFAULT_METHODS, BenchMethod, expand_grid, parse_method
from bench.padding import add_idle_layers
from bench.plan import Plan, describe_workload, open_record, refuse_guesses
from bench.prompt_sets import open_workload
from bench.record import save_progress, write_record
from bench.screening import Prompt, choose_prompts
from bench.workloads import Workload
from ssd_jax import SSD, Model, load_model, place_model, split_cpu
from ssd_jax.cli.busy import busy
from ssd_jax.cli.environment import use_compilation_cache
from ssd_jax.cli.flags import add_device_flags, add_model_flags
from ssd_jax.cli.parser import number, whole_number
from ssd_jax.engine.speculation import check_pair
from ssd_jax.errors import RequestError
from ssd_jax.model import demo_folder

DEFAULT_WORKLOADS = ("code", "math", "chat", "copy-heavy")


def main(argv: Sequence[str]) -> int:
    """Measure what the command line asks for; the exit code."""
    args = _arguments(argv)
    workloads = [open_workload(name) for name in args.workloads]
    plan = Plan(
        model=args.model or "demo",
        draft_model=args.draft_model or "demo",
        dtype=args.dtype,
        split=args.split,
        idle_layers=tuple(args.idle_layers),
        methods=expand_grid(args.methods, args.draft_len, args.fan_out),
        workloads=tuple(map(describe_workload, workloads)),
        temperatures=tuple(args.temperature) or (None,),
        batches=tuple(args.batch),
        num_prompts=args.num_prompts,
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        host=args.host,
        timeline=args.timeline,
    )
    out = Path(args.out) if args.out else None
    use_compilation_cache(args.compilation_cache)
    draft_device = split_cpu()[1] if plan.split else None
    record = open_record(plan, out)
    if record["complete"]:
        print(f"{out} holds the whole run already.", file=sys.stderr)
        return 0
    target, methods = open_models(args, plan, draft_device)
    for workload in workloads:
        refuse_guesses(workload, methods)
    if out is not None:
        write_record(record, out)  # what cannot be written is noticed now
    try:
        with _progress(plan, quiet=args.quiet) as progress:
            measure(plan, workloads, target, methods, record, out, progress)
    except KeyboardInterrupt:
        if out is not None:
            print(f"\nInterrupted: the same command goes on with {out}.", file=sys.stderr)
        raise
    if out is None:
        write_record(record, None)
    return 0


def open_models(
    args: argparse.Namespace,
    plan: Plan,
    draft_device: Any = None,  # noqa: ANN401 (jax.Device)
) -> tuple[Model, list[BenchMethod]]:
    """The target, and the methods with the draft in them.

    Raises:
        RequestError, ConfigError: a method that is not understood, or models that do not match.
    """
    if args.model and not args.draft_model:
        raise RequestError("A --model of your own needs --draft-model as well.")
    with busy("loading the models", quiet=args.quiet):
        target = load_model(args.model, args.dtype)
        draft = load_model(args.draft_model or demo_folder("draft"), args.dtype)
    check_pair(target, draft)
    target = add_idle_layers(target, plan.idle_layers[0])
    draft = add_idle_layers(draft, plan.idle_layers[1])
    own_draft = draft if draft_device is None else place_model(draft, draft_device)
    return target, [parse_method(name, draft, own_draft) for name in plan.methods]


def measure(
    plan: Plan,
    workloads: Sequence[Workload],
    target: Model,
    methods: Sequence[BenchMethod],
    record: dict[str, Any],
    out: Path | None,
    progress: Progress,
) -> None:
    """Fill the record with what it does not hold yet, writing it after every batch of prompts."""
    (bar,) = progress.task_ids

    def tell(name: str) -> None:
        progress.update(bar, advance=1, description=name)

    for index, (workload, asked, size) in enumerate(_cells(plan, workloads)):
        num_units = plan.num_prompts // size
        per_unit = len(methods) * (plan.rounds + PASSES_BESIDES_ROUNDS)
        known = record["cells"][index] if index < len(record["cells"]) else None
        if known is not None and len(known["units"]) == known["num_units"]:
            progress.update(bar, advance=num_units * per_unit)
            continue
        temperature = workload.temperature if asked is None else asked
        prompts, num_dropped = choose_prompts(
            target, workload, temperature, plan.num_prompts, plan.max_tokens
        )
        batches = [prompts[at : at + size] for at in range(0, len(prompts) - size + 1, size)]
        if not batches:
            raise RequestError(
                f"{workload.name} should fill a batch of {size}, got {len(prompts)} usable "
                "prompts: lower --batch or choose other prompts."
            )
        prepared = [method.prepare(target, prompts[0].params, size) for method in methods]
        if known is None:
            known = {
                "workload": workload.name,
                "temperature": temperature,
                "batch": size,
                "num_units": len(batches),
                "dropped_for_too_little_repeated": num_dropped,
                "units": [],
                "timelines": {},
                "methods": {},
            }
            record["cells"].append(known)
        progress.update(bar, advance=(num_units - len(batches) + len(known["units"])) * per_unit)
        _measure_cell(plan, target, prepared, batches, known, record, out, tell)
    record["complete"] = True
    save_progress(record, out)


def _measure_cell(
    plan: Plan,
    target: Model,
    methods: Sequence[BenchMethod],
    batches: Sequence[Sequence[Prompt]],
    cell: dict[str, Any],
    record: dict[str, Any],
    out: Path | None,
    tell: Tell,
) -> None:
    """Measure the batches that are missing, and keep the cell's figures up to date."""
    label = f"{cell['workload']}, T {cell['temperature']:g}, batch {cell['batch']}"
    for place, batch in enumerate(batches[len(cell["units"]) :], len(cell["units"]) + 1):
        where = f"{label}, {place} of {len(batches)}"
        unit = measure_unit(
            target,
            methods,
            batch,
            rounds=plan.rounds,
            with_host=plan.host,
            tell=lambda name, where=where: tell(f"{where}: {name}"),
        )
        for method in methods:
            ssd = method.speculation
            missing = method.name not in cell["timelines"]
            if plan.timeline and missing and isinstance(ssd, SSD):
                cell["timelines"][method.name] = record_timeline(target, ssd, batch)
        cell["units"].append(unit)
        cell["methods"] = summarise(cell["units"])
        for method in methods:
            if method.round_times is not None:
                cell["methods"][method.name]["round_times_s"] = method.round_times.seconds
        save_progress(record, out)


def _cells(
    plan: Plan, workloads: Sequence[Workload]
) -> Iterator[tuple[Workload, float | None, int]]:
    """Workload, temperature asked for, and batch size of each cell of the grid."""
    for workload in workloads:
        for temperature in plan.temperatures:
            for size in plan.batches:
                yield workload, temperature, size


def _progress(plan: Plan, *, quiet: bool) -> Progress:
    """A bar on stderr with one task: passes of a method over a batch."""
    progress = Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        disable=quiet,
    )
    passes = len(plan.methods) * (plan.rounds + PASSES_BESIDES_ROUNDS)
    progress.add_task("starting", total=plan.num_passes * passes)
    return progress


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("run", "Every decoding method on the same prompts: one JSON record.")
    grid = parser.add_argument_group("the grid")
    grid.add_argument(
        "--workloads",
        nargs="+",
        default=DEFAULT_WORKLOADS,
        metavar="NAME[=PATH]",
        help="see bench/prompt_sets.py; own=PATH reads prompts of your own (default: "
        f"{' '.join(DEFAULT_WORKLOADS)})",
    )
    grid.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help="such as draft:k=4 or ssd:k=3,f=4-3-2-3, see bench/methods.py; ar is always there "
        f"(default: {' '.join(DEFAULT_METHODS)})",
    )
    for flag, metavar, text in (
        ("--draft-len", "K", "for methods that do not say k (n-grams: max)"),
        ("--fan-out", "F", "for ssd where it does not say f, such as 3 or 4-3-2-3"),
    ):
        grid.add_argument(
            flag, nargs="+", default=(), metavar=metavar, help=f"{text} (default: the engine's)"
        )
    grid.add_argument(
        "--temperature",
        nargs="+",
        type=number,
        default=(),
        metavar="T",
        help="0 is greedy (default: the workload's own, mostly 0)",
    )
    grid.add_argument(
        "--batch",
        nargs="+",
        type=whole_number,
        default=(1,),
        metavar="N",
        help="prompts decoded together (default: 1)",
    )
    size = parser.add_argument_group("how much")
    for flag, default, text in (
        ("--num-prompts", 8, "of each workload"),
        ("--max-tokens", 128, "tokens of each answer"),
        ("--rounds", 3, "times each batch is timed, the methods taking turns"),
    ):
        size.add_argument(
            flag,
            type=whole_number,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    models = parser.add_argument_group("models")
    add_model_flags(models)
    models.add_argument(
        "--draft-model", metavar="DIR", help="the draft's folder (default: the demo draft)"
    )
    models.add_argument(
        "--idle-layers",
        type=whole_number,
        nargs=2,
        default=(0, 0),
        metavar=("T", "D"),
        help="layers that change nothing, added to target and draft: other costs, same agreement "
        "(default: 0 0)",
    )
    extras = parser.add_argument_group("what else")
    for flag, text in (
        ("--split", "half of the CPU's cores for the target, half for the draft of ssd"),
        ("--host", "also time what the host takes"),
        ("--timeline", "also record when the programs of ssd's rounds ran"),
        ("--quiet", "no progress on stderr"),
    ):
        extras.add_argument(
            flag,
            action=argparse.BooleanOptionalAction,
            default=False,
            help=f"{text} (default: no)",
        )
    extras.add_argument(
        "--out", metavar="FILE", help="the record; without it a run cannot be resumed (stdout)"
    )
    add_device_flags(parser.add_argument_group("device"))
    return read_arguments(parser, argv)
