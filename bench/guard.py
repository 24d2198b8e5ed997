"""`ssd-jax bench guard`: whether the ratios that matter are still what they were.

    ssd-jax bench guard --out guard.json          measures a small grid, then judges it
    ssd-jax bench guard --record run.json         judges a record that is there
    ssd-jax bench guard --record new.json --against old.json --tolerance 0.05

Judged are, for each cell of the grid: the best speculation against plain decoding, the best SSD
against the best speculation, the best overlap efficiency of SSD, and the least share of the host.
The limits are those in bench/limits.toml, or what another record reached less a tolerance. The
exit code is 1 if a limit is not kept. What can be counted rather than timed (compilations,
dispatches, transfers, bytes) is in tests/unit/test_bench_counts.py instead.
"""

import argparse
import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import run
from bench.arguments import make_parser, read_arguments
from bench.record import read_record, require_run
from ssd_jax.cli.parser import number
from ssd_jax.errors import RequestError

GRID = (
    *("--workloads", "code", "copy-heavy"),
    *("--methods", "draft:k=2", "draft:k=3", "ngram", "combined:k=3"),
    *("ssd:k=3,f=3-2-2-3", "ssd:k=4,f=2-2-1-1-2"),
    *("--num-prompts", "4", "--max-tokens", "128", "--rounds", "5"),
    *("--split", "--host", "--timeline"),
)
LIMITS = Path(__file__).parent / "limits.toml"
SPECULATION, SSD, OVERLAP, HOST = (
    "speculation/ar",
    "ssd/speculation",
    "overlap efficiency",
    "host share",
)
AT_MOST = (HOST,)  # of which less is better


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A ratio of a cell, and the limit that it has to keep."""

    cell: str
    ratio: str
    value: float
    limit: float

    @property
    def is_kept(self) -> bool:
        """Whether the value is on the right side of the limit."""
        if self.ratio in AT_MOST:
            return self.value <= self.limit
        return self.value >= self.limit


def main(argv: Sequence[str]) -> int:
    """Judge what the command line names: exit code 1 if a limit is not kept."""
    args = _arguments(argv)
    if not 0 <= args.tolerance < 1:
        raise RequestError(f"--tolerance should be from 0 to below 1, got {args.tolerance}.")
    if args.record is None:
        if args.out is None:
            raise RequestError("Give --record with a record, or --out to measure one into.")
        run.main([*GRID, "--out", args.out])
    path = Path(args.record or args.out)
    found = ratios(_open(path))
    if args.against:
        limits = loosened(ratios(_open(Path(args.against))), args.tolerance)
    else:
        limits = {cell: read_limits(LIMITS) for cell in found}
    judgements = list(judge(found, limits))
    if not judgements:
        raise RequestError(f"{path} should hold ratios that have a limit, got none.")
    for one in judgements:
        bound = "at most" if one.ratio in AT_MOST else "at least"
        verdict = "kept" if one.is_kept else "NOT KEPT"
        print(f"{one.cell}: {one.ratio} {one.value:.3f}, {bound} {one.limit:.3f}: {verdict}")
    return 0 if all(one.is_kept for one in judgements) else 1


def ratios(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The guarded ratios of every cell that was measured, those that its methods allow."""
    found = {}
    for cell in record["cells"]:
        if cell["units"]:
            name = f"{cell['workload']}, T {cell['temperature']:g}, batch {cell['batch']}"
            found[name] = _ratios_of_cell(cell)
    return found


def _ratios_of_cell(cell: Mapping[str, Any]) -> dict[str, float]:
    methods = cell["methods"]
    speeds = {name: one["decode_ratio_to_ar"] for name, one in methods.items()}
    ssd = [speed for name, speed in speeds.items() if name.startswith("ssd")]
    others = [speed for name, speed in speeds.items() if not name.startswith(("ssd", "ar", "wide"))]
    summaries = [one["summary"] for one in cell["timelines"].values() if one["summary"]]
    overlaps = [one["overlap_efficiency"] for one in summaries]
    shares = [
        one["stream_host_share_spread"][1]
        for one in methods.values()
        if "stream_host_share_spread" in one
    ]
    found = {}
    if others:
        found[SPECULATION] = max(others)
    if ssd and others:
        found[SSD] = max(ssd) / max(others)
    if overlaps:
        found[OVERLAP] = max(overlaps)
    if shares:
        found[HOST] = min(shares)
    return found


def judge(
    found: Mapping[str, Mapping[str, float]], limits: Mapping[str, Mapping[str, float]]
) -> Iterator[Judgement]:
    """Every ratio that has a limit."""
    for cell, own in found.items():
        for ratio, value in own.items():
            if ratio in limits.get(cell, {}):
                limit = limits[cell][ratio]
                yield Judgement(cell=cell, ratio=ratio, value=value, limit=limit)


def loosened(
    found: Mapping[str, Mapping[str, float]], tolerance: float
) -> dict[str, dict[str, float]]:
    """Limits that these ratios keep with so large a share to spare (the host's share: so much)."""
    return {
        cell: {
            ratio: value + tolerance if ratio in AT_MOST else value * (1 - tolerance)
            for ratio, value in own.items()
        }
        for cell, own in found.items()
    }


def read_limits(path: Path) -> dict[str, float]:
    """The limits in a TOML file, by ratio."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {ratio: float(limit) for ratio, limit in table.items()}


def _open(path: Path) -> dict[str, Any]:
    record = read_record(path)
    require_run(record, path)
    return record


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("guard", "Whether the ratios that matter are still what they were.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--record", metavar="FILE", help="a record of `bench run` to judge")
    source.add_argument(
        "--out", metavar="FILE", help="measure a small grid of the demo pair into this record first"
    )
    parser.add_argument(
        "--against", metavar="FILE", help="a record to compare with (default: bench/limits.toml)"
    )
    parser.add_argument(
        "--tolerance",
        type=number,
        default=0.1,
        metavar="SHARE",
        help="how far below --against a ratio may lie (default: 0.1)",
    )
    return read_arguments(parser, argv)
