"""The simulator's results as Markdown and as a JSON record."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from bench.record import environment
from bench.simulate.calibrate import Constant
from bench.simulate.comparison import TOLERANCE, Comparison
from bench.simulate.methods import SimulatedMethod
from bench.simulate.scale import Point

SCHEMA = 1


def comparison_tables(rows: Sequence[Comparison]) -> str:
    """A table for each group."""
    tables = []
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        lines = [
            f"**{group}**, tokens/s",
            "",
            "| figure | published | simulated | difference | |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in members:
            kind = "fitted" if row.fitted else "predicted"
            kind += "" if row.holds else f", beyond {TOLERANCE:.0%}"
            kind += "" if row.promised else " (no promise)"
            lines.append(
                f"| {row.figure} | {row.published:.4g} | {row.simulated:.4g} | {row.error:+.1%} "
                f"| {kind} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def constant_table(constants: Iterable[Constant]) -> str:
    """Name, value and origin."""
    lines = ["| constant | value | from |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.value} | {one.origin} |" for one in constants]
    return "\n".join(lines)


def point_table(points: Sequence[Point]) -> str:
    """One line a point: what was chosen and what it reaches."""
    lines = [
        "| rows | method | chips | settings | tokens/s a row | range | tokens/s a chip | hits "
        "| round, ms | draft late |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        simulated = point.simulated
        hits = "" if simulated.hit_rate is None else f"{simulated.hit_rate:.0%}"
        limits = f"{point.low / point.rows:.0f} to {point.high / point.rows:.0f}"
        lines.append(
            f"| {point.rows} | {point.kind} | {point.chips} | {describe(point.method)} "
            f"| {point.per_row:.0f} | {limits if point.kind == 'SSD' else ''} "
            f"| {point.per_chip:.0f} | {hits} | {simulated.round_s * 1e3:.1f} "
            f"| {f'{simulated.late:.0%}' if point.kind == 'SSD' else ''} |"
        )
    return "\n".join(lines)


def variant_table(variants: Sequence[tuple[str, float, float]], rows: int) -> str:
    """SSD, synchronous speculation and their ratio, under each assumption."""
    lines = [
        f"| {rows} rows, SSD on one chip more | SSD, tokens/s a row | draft | SSD over draft |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {ssd / rows:.0f} | {draft / rows:.0f} | {ssd / draft:.2f} |"
        for name, ssd, draft in variants
    ]
    return "\n".join(lines)


def describe(method: SimulatedMethod) -> str:
    """The settings in short; nothing for plain decoding."""
    if method.draft_len == 0:
        return ""
    if method.fan_out is None:
        return f"k={method.draft_len}"
    lists = [
        "-".join(map(str, counts))
        for counts in (method.fan_out.after_hit, method.fan_out.after_miss)
    ]
    shown = lists[0] if lists[0] == lists[1] else f"{lists[0]}, miss {lists[1]}"
    return f"k={method.draft_len}, f={shown}, {method.fallback}"


def comparison_record(
    rows: Sequence[Comparison], constants: Sequence[Constant]
) -> dict[str, object]:
    """All comparisons and constants, with where they were made."""
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "tolerance": TOLERANCE,
        "constants": [dataclasses.asdict(one) for one in constants],
        "comparisons": [{**dataclasses.asdict(row), "error": row.error} for row in rows],
    }


def scale_record(
    pairs: Sequence[tuple[str, Sequence[Point]]], assumptions: dict[str, object]
) -> dict[str, object]:
    """All points of all pairs, with what they assume."""
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "assumptions": assumptions,
        "pairs": {name: [dataclasses.asdict(point) for point in points] for name, points in pairs},
    }
