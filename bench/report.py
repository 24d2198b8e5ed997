"""`ssd-jax bench report`: the tables and plots of records, in a folder.

    ssd-jax bench report run.json micro.json peers.json --out report
    ssd-jax bench report peers.json

Writes report.md and a PNG for each kind of plot that the records have data for: speed by workload
and method, hit rate against fan-out, acceptance by position, throughput against batch, and the
rounds of SSD. Several records of `bench run` are told apart by their files' names. Without --out
the tables are printed.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.arguments import make_parser, read_arguments
from bench.markdown import table
from bench.peers.report import describe_peers, require_peers
from bench.plots import draw_all
from bench.record import read_record, require_run
from ssd_jax.errors import RequestError
from ssd_jax.timeline.picture import check_drawable
from ssd_jax.whole_file import write_whole

Record = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Write the report that the command line asks for; the exit code."""
    args = _arguments(argv)
    records = {path.stem: _open(path) for path in map(Path, args.records)}
    if len(records) < len(args.records):
        raise RequestError("Records are told apart by their names, got two of one: rename one.")
    if args.out is None:
        print(_report(records, ()))
        return 0
    folder = Path(args.out)
    if args.plots:
        check_drawable()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out should be a folder, got {folder} ({error}).") from error
    runs = {name: record for name, record in records.items() if record["kind"] == "run"}
    pictures = draw_all(runs) if args.plots else {}
    for name, content in pictures.items():
        write_whole(folder / name, content)
    write_whole(folder / "report.md", (_report(records, pictures) + "\n").encode())
    print(folder / "report.md")
    return 0


def _report(records: dict[str, Record], pictures: Iterable[str]) -> str:
    return "\n\n".join(
        part for name, record in records.items() for part in describe(name, record, pictures)
    )


def describe(name: str, record: Record, pictures: Iterable[str]) -> Iterator[str]:
    """The parts of a record's report in Markdown."""
    yield f"# {name}"
    yield _origin(record)
    if record["kind"] == "micro":
        yield from _micro(record)
        return
    if record["kind"] == "peers":
        yield from describe_peers(record)
        return
    for cell in record["cells"]:
        if cell["units"]:
            yield f"## {_cell_name(cell)}"
            yield method_table(cell)
            yield _what_was_read(cell)
            if any("drafters" in figures for figures in cell["methods"].values()):
                yield acceptance_table(cell)
            if cell["timelines"]:
                yield timeline_table(cell)
    for picture in pictures:
        if picture.startswith(f"{name}-"):
            yield f"![{picture.removesuffix('.png')}]({picture})"


def method_table(cell: Record) -> str:
    """Speed and latency of a cell's methods."""
    head = (
        "method",
        "tokens/s",
        "against ar",
        "over prompts",
        "over rounds",
        "tokens a step",
        "hits",
        "prefill ms",
        "first token ms",
        "gap ms (median, 95 %)",
        "compile s",
        "peak MiB",
        "differ",
    )
    rows = []
    for name, one in cell["methods"].items():
        rows.append(
            (
                name,
                f"{one['decode_tokens_per_s']:.0f}",
                f"{one['decode_ratio_to_ar']:.2f}",
                _range(one["decode_ratio_spread"]),
                _range(one["decode_ratio_spread_over_rounds"]),
                f"{one['tokens_per_target_step']:.2f}",
                _percent(one.get("hit_rate")),
                f"{one['prefill_s_spread'][1] * 1e3:.1f}",
                f"{one['first_token_s_spread'][1] * 1e3:.1f}",
                f"{_ms(one['gap_s']['median'])}, {_ms(one['gap_s']['p95'])}",
                f"{one['compile_s']:.1f}",
                _mebibytes(one["peak_bytes"]),
                f"{one['outputs_that_differ']}",
            )
        )
    return table(head, rows)


def acceptance_table(cell: Record) -> str:
    """How often each drafter drafted, and how much of it was accepted."""
    head = (
        "method",
        "drafter",
        "rounds with a draft",
        "accepted",
        "accepted a draft",
        "at 1, 2, ...",
    )
    rows = []
    for name, one in cell["methods"].items():
        for drafter, own in one.get("drafters", {}).items():
            if not own["num_draft_tokens"]:
                continue
            shares = [f"{share:.0%}" for share in own["accepted_at_position"] if share >= 0.005]
            rows.append(
                (
                    name,
                    drafter,
                    _percent(own["rounds_with_a_draft"]),
                    _percent(own["acceptance_rate"]),
                    f"{own['accepted_per_draft']:.2f}",
                    " ".join(shares),
                )
            )
    return table(head, rows)


def timeline_table(cell: Record) -> str:
    """Medians of the parts of SSD's rounds."""
    head = ("method", "round ms", "verify ms", "prepare ms", "hit ms", "miss ms", "overlap")
    rows = []
    for name, timeline in cell["timelines"].items():
        one = timeline["summary"]
        if one is not None:
            parts = ("round_s", "verify_s", "prepare_s", "hit_s", "miss_s")
            overlap = _percent(one["overlap_efficiency"])
            rows.append((name, *(_ms(one[part]) for part in parts), overlap))
    return table(head, rows)


def _micro(record: Record) -> Iterator[str]:
    for title, part in record["parts"].items():
        yield f"## {title}"
        yield part["what"]
        head = (part["axis"], "microseconds", "lowest and highest", "against the first")
        base = part["results"][0]["median_s"]
        rows = [
            (
                str(one["at"]),
                f"{one['median_s'] * 1e6:.1f}",
                f"{one['min_s'] * 1e6:.1f} to {one['max_s'] * 1e6:.1f}",
                f"{one['median_s'] / base:.2f}",
            )
            for one in part["results"]
        ]
        yield table(head, rows)


def _origin(record: Record) -> str:
    where = record["environment"]
    parts = [
        f"{where['device_kind']} ({where['platform']}), {where['cpus']} CPU cores",
        f"jax {where['jax']}",
        f"commit {where['commit'] or 'unknown'}",
        where["date"],
    ]
    if record["kind"] == "run":
        plan = record["plan"]
        parts.append(f"target {plan['model']}, draft {plan['draft_model']}")
        parts.append(
            f"{plan['max_tokens']} tokens an answer, medians of {plan['rounds']} rounds"
            + (", target and draft on cores of their own" if plan["split"] else "")
        )
    if not record.get("complete", True):
        parts.append("**not complete**")
    return "; ".join(parts) + "."


def _what_was_read(cell: Record) -> str:
    prompts = [count for unit in cell["units"] for count in unit["prompt_tokens"]]
    repeated = [share for unit in cell["units"] for share in unit["repeated_share"]]
    return (
        f"{len(prompts)} prompts of {min(prompts)} to {max(prompts)} tokens; "
        f"{sum(repeated) / len(repeated):.0%} of the plain answers repeats the prompt. "
        "Ranges are lowest to highest."
    )


def _cell_name(cell: Record) -> str:
    return f"{cell['workload']}, temperature {cell['temperature']:g}, batch {cell['batch']}"


def _range(spread: Sequence[float]) -> str:
    return f"{spread[0]:.2f} to {spread[-1]:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _mebibytes(peak: dict[str, int | None]) -> str:
    most = peak["device"] or peak["resident"]
    return "" if most is None else f"{most / 2**20:.0f}"


def _open(path: Path) -> Record:
    record = read_record(path)
    match record.get("kind"):
        case "micro":
            pass
        case "peers":
            require_peers(record, path)
        case _:
            require_run(record, path)
    return record


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("report", "Tables (Markdown) and plots (PNG) of records.")
    parser.add_argument(
        "records",
        nargs="+",
        metavar="RECORD",
        help="of `bench run`, `bench micro` or `bench peers`",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the report (default: tables alone, on stdout)"
    )
    parser.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw as well, which needs matplotlib (default: yes)",
    )
    return read_arguments(parser, argv)
