"""The simulator's command line: `check` it, `run` settings, or `scale` to larger placements."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.arguments import make_parser, read_arguments
from bench.record import write_record
from bench.simulate import published
from bench.simulate.calibrate import (
    Calibration,
    calibrate,
    costs_on_h100,
    geometric_laws,
    uniform_ssd,
)
from bench.simulate.chips import CHIPS, SHAPES, find_chip
from bench.simulate.comparison import TOLERANCE, compare_published, table_acceptances
from bench.simulate.costs import ChipCosts, Costs
from bench.simulate.methods import SimulatedMethod, parse_simulated
from bench.simulate.outcomes import OutcomeLaws, geometric_law, power_law_through
from bench.simulate.own_machine import compare_own
from bench.simulate.plots import (
    check_drawable,
    plot_comparison,
    plot_draft_lens,
    plot_scale,
)
from bench.simulate.records import (
    OWN_MACHINE,
    PartsRecord,
    Trace,
    read_cells,
    read_parts,
)
from bench.simulate.report import (
    comparison_record,
    comparison_tables,
    constant_table,
    point_table,
    scale_record,
    variant_table,
)
from bench.simulate.rounds import Work, simulate
from bench.simulate.scale import (
    DRAFT_LENS,
    NGRAM_ACCEPTANCE,
    Assumptions,
    known_acceptance,
    make_placement,
    predict_points,
    vary,
)
from bench.simulate.traces import read_trace, trace_laws
from ssd_jax.errors import RequestError

DEFAULT_PAIRS = (
    "llama-3.1-70b/llama-3.2-1b",
    "qwen3-32b/qwen3-0.6b",
    "llama-3.1-405b/llama-3.1-8b",
)


def simulate_command(argv: Sequence[str]) -> int:
    """Run one action with its arguments; the exit code.

    Raises:
        SsdJaxError: something in them or in the files they name is wrong.
    """
    parser = make_parser("simulate", "What rounds cost and bring, on machines at hand and not.")
    actions = "; ".join(f"{name}: {text}" for name, (text, _, _) in _ACTIONS.items())
    parser.add_argument("action", choices=tuple(_ACTIONS), metavar="ACTION", help=actions)
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="of the action, see `ssd-jax bench simulate ACTION --help`",
    )
    asked = parser.parse_args(argv)
    text, add_arguments, act = _ACTIONS[asked.action]
    own = make_parser(f"simulate {asked.action}", f"{text[0].upper()}{text[1:]}.")
    add_arguments(own)
    return act(read_arguments(own, asked.options))


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts",
        type=Path,
        nargs="+",
        default=OWN_MACHINE,
        help="own times (those of bench/RESULTS.md)",
    )
    parser.add_argument(
        "--measured", type=Path, help="record of own speeds (those in the file of --parts)"
    )
    parser.add_argument("--out", type=Path, help="folder for the record and plots (none)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="METHOD",
        help="such as ar, draft:k=3 or ssd:k=3,f=3-2-2-3,fallback=ngram",
    )
    parser.add_argument("--parts", type=Path, help="times: a parts record or a tuned TOML file")
    parser.add_argument("--pair", help="or else TARGET/DRAFT of the models known")
    _add_placement(parser)
    parser.add_argument("--draft-chips", type=int, default=1, help="chips of SSD's draft (1)")
    parser.add_argument(
        "--trace", type=Path, help="outcomes: a record of SSD, see bench/simulate/traces.py"
    )
    parser.add_argument("--trace-method", help="which one, if it is a record of `bench run`")
    parser.add_argument("--acceptance", type=float, help="or else: chance that a token is accepted")
    parser.add_argument(
        "--hit-rate", type=float, help="share of outcomes that 3 guesses hold (0.88)"
    )
    parser.add_argument("--decay", type=float, default=1.0, help="of misses with guesses (1)")
    parser.add_argument("--batch", type=int, help="rows decoded together (1, or those of --parts)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens an answer (512)")
    parser.add_argument("--runs", type=int, default=64, help="how often it is repeated (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random outcomes (0)")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=DEFAULT_PAIRS,
        metavar="TARGET/DRAFT",
        help=f"of {', '.join(SHAPES)} (three pairs)",
    )
    _add_placement(parser)
    parser.add_argument("--draft-chips", type=int, nargs="+", default=(1, 2, 4), help="(1 2 4)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32, 64), help="(1 to 64)"
    )
    parser.add_argument("--out", type=Path, help="folder for the record and plots (none)")


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chip", default="b200", help=f"one of {', '.join(CHIPS)} (b200)")
    parser.add_argument("--target-chips", type=int, default=8, help="that divide the target (8)")
    parser.add_argument(
        "--context", type=int, default=1000, help="tokens in front of each row, on average (1000)"
    )


def _check(args: argparse.Namespace) -> int:
    folder = _folder(args.out)
    calibration = calibrate()
    rows = []
    for path in args.parts:
        own = read_parts(path)
        cells = read_cells(args.measured, own.batch) if args.measured else own.cells
        if not cells:
            raise RequestError(
                f"{path} tells times but no speeds to compare with: name a record of "
                "`ssd-jax bench run` with --measured."
            )
        rows += compare_own(own, cells)
    rows += compare_published(calibration)
    print(comparison_tables(rows), "", constant_table(calibration.constants), sep="\n")
    if folder:
        write_record(comparison_record(rows, calibration.constants), folder / "check.json")
        plot_comparison(rows, folder / "check.png")
        _plot_reproduction(calibration, folder / "draft_len.png")
    failed = [row for row in rows if not row.holds]
    predicted = sum(row.promised and not row.fitted for row in rows)
    print(
        f"\n{predicted - len([row for row in failed if not row.fitted])} of {predicted} predicted "
        f"figures are within {TOLERANCE:.0%}."
    )
    return 1 if failed else 0


def _plot_reproduction(calibration: Calibration, path: Path) -> None:
    table = published.TABLES[-1]
    costs = costs_on_h100(
        calibration.latencies, calibration.engine, table.target, table.draft_model
    )
    acceptances = table_acceptances(calibration, table)
    simulated = {
        k: statistics.mean(
            simulate(
                uniform_ssd(k, published.PROFILED_GUESSES),
                costs,
                geometric_laws(k, acceptance, calibration.guesses),
                Work(),
            ).tokens_per_s
            for acceptance in acceptances
        )
        for k in range(1, 9)
    }
    measured = {k: speed for k, speed in table.ssd_mean.items() if k is not None}
    plot_draft_lens(measured, simulated, f"SSD, {table.pair}, 4 + 1 H100, fan-out 3", path)


def _run(args: argparse.Namespace) -> int:
    methods = [parse_simulated(name) for name in args.methods]
    record = read_parts(args.parts) if args.parts else None
    batch, costs = _batch_and_costs(args, record)
    trace = (
        read_trace(args.trace, args.trace_method)
        if args.trace
        else record.trace
        if record
        else None
    )
    work = Work(rows=batch, tokens=args.tokens, runs=args.runs)
    lines = [
        "| method | tokens/s | spread | tokens a round | hits | round, ms | rounds that wait |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, method in zip(args.methods, methods, strict=True):
        laws = _laws(args, method, trace)
        result = simulate(method, costs, laws, work, seed=args.seed)
        hits = "" if result.hit_rate is None else f"{result.hit_rate:.1%}"
        lines.append(
            f"| {name} | {result.tokens_per_s:.1f} | {result.spread:.1f} "
            f"| {result.tokens_per_round:.2f} | {hits} | {result.round_s * 1e3:.3f} "
            f"| {result.waits:.1%} |"
        )
    print("\n".join(lines))
    return 0


def _batch_and_costs(args: argparse.Namespace, record: PartsRecord | None) -> tuple[int, Costs]:
    """Times from the parts record, or else for the pair on chips."""
    if (record is None) == (args.pair is None):
        raise RequestError("Times come from either --parts or --pair: give one of them.")
    if record is not None:
        if args.batch not in (None, record.batch):
            raise RequestError(
                f"The times of {args.parts} are of {record.batch} rows, got --batch {args.batch}: "
                "measure the parts with so many."
            )
        return record.batch, record.costs
    calibration = calibrate()
    batch = 1 if args.batch is None else args.batch
    target, draft = split_pair(args.pair)
    placement = make_placement(find_chip(args.chip), target, draft, args.target_chips, args.context)
    return batch, ChipCosts(
        placement=placement.with_draft_chips(args.draft_chips),
        latencies=calibration.latencies,
        engine=calibration.engine,
        batch=batch,
    )


def _laws(
    args: argparse.Namespace, method: SimulatedMethod, trace: Trace | None
) -> OutcomeLaws | None:
    """Outcomes by chance if an acceptance is given, or else those of the trace."""
    if method.draft_len == 0:
        return None
    if args.acceptance is None:
        if trace is None:
            raise RequestError(
                "How drafts come out must be told by --trace, by a tuned file in --parts or by "
                "--acceptance, got none of them."
            )
        return trace_laws(trace, method)
    hit_rate = published.HIT_RATE if args.hit_rate is None else args.hit_rate
    if not 0 <= hit_rate <= 1:
        raise RequestError(f"--hit-rate must be from 0 to 1, got {hit_rate}.")
    guesses = power_law_through(published.PROFILED_GUESSES, hit_rate, args.decay)
    after_hit = geometric_law(method.draft_len, args.acceptance, guesses)
    after_miss = after_hit
    if method.fallback == "ngram":
        after_miss = geometric_law(method.draft_len, NGRAM_ACCEPTANCE, guesses)
    return OutcomeLaws(after_hit=after_hit, after_miss=after_miss)


def _scale(args: argparse.Namespace) -> int:
    folder = _folder(args.out)
    calibration = calibrate()
    pairs = []
    origins = {}
    for pair in args.pairs:
        target, draft = split_pair(pair)
        placement = make_placement(
            find_chip(args.chip), target, draft, args.target_chips, args.context
        )
        acceptance, origin = known_acceptance(calibration, target, draft)
        assumptions = Assumptions(
            latencies=calibration.latencies,
            engine=calibration.engine,
            guesses=calibration.guesses,
            acceptance=acceptance,
        )
        points = predict_points(placement, assumptions, args.batch, args.draft_chips)
        origins[pair] = f"{acceptance:.3f}, {origin}"
        pairs.append((f"{target} / {draft}", points))
        print(f"## {pair} on {args.target_chips} {args.chip}, acceptance {origins[pair]}\n")
        print(point_table(points), "\n")
        for rows in dict.fromkeys((min(args.batch), max(args.batch))):
            print(variant_table(vary(placement, assumptions, rows), rows), "\n")
    print(constant_table(calibration.constants))
    if folder:
        stated = {
            "chip": args.chip,
            "target_chips": args.target_chips,
            "context": args.context,
            "acceptance": origins,
            "ngram_acceptance": NGRAM_ACCEPTANCE,
            "draft_lengths": [min(DRAFT_LENS), max(DRAFT_LENS)],
            "constants": {one.name: f"{one.value}, {one.origin}" for one in calibration.constants},
        }
        write_record(scale_record(pairs, stated), folder / "scale.json")
        title = (
            f"{args.target_chips} {args.chip.upper()} for the target; SSD drafts on the chips above"
            f" {args.target_chips}. Best settings at each point, latencies as on H100"
        )
        plot_scale(pairs, title, folder / "scale.png")
    return 0


def split_pair(pair: str) -> tuple[str, str]:
    """Target and draft of `target/draft`.

    Raises:
        RequestError: it is not two names.
    """
    names = pair.split("/")
    if len(names) != 2 or not all(names):
        raise RequestError(
            f"A pair is TARGET/DRAFT with models of {', '.join(SHAPES)}, got {pair!r}."
        )
    return names[0], names[1]


def _folder(path: Path | None) -> Path | None:
    """The folder for results, made if need be; drawing is tried before hours are spent."""
    if path is None:
        return None
    check_drawable()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"Results should go to the folder {path}, which cannot be made ({error.strerror}): "
            "name another."
        ) from error
    return path


_ACTIONS: dict[str, tuple[str, Callable[..., None], Callable[..., int]]] = {
    "check": (
        "compare with measured and published speeds; exit code 1 beyond a tenth",
        _add_check,
        _check,
    ),
    "run": ("simulate methods with given times and outcomes", _add_run, _run),
    "scale": ("predict larger placements", _add_scale, _scale),
}
