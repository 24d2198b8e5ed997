"""Plots of a run's record, whose lines and bars are told apart without colour.

Each function draws one figure from plain JSON, or nothing where the record has no data for it.
"""

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

MOST_ROUNDS = 14  # of a timeline; more would be too narrow to read
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----", "**", "||||")
_MARKERS = "osv^D*PX<>"
_LINES = ("-", "--", "-.", ":")
_COLOURS = ("#2f6db0", "#f2a03d", "#1d7a46", "#b8455b", "#7a5ba8", "#8a8a8a", "#3fb6c4", "#c9b037")


def draw_all(runs: Mapping[str, Record]) -> dict[str, bytes]:
    """The PNGs of every record that has something to show, by file name."""
    kinds = {
        "speed": draw_speed,
        "hits": draw_hits,
        "acceptance": draw_acceptance,
        "batch": draw_batches,
        "rounds": draw_rounds,
    }
    pictures = {}
    for name, record in runs.items():
        for kind, draw in kinds.items():
            figure = draw(record)
            if figure is not None:
                content = io.BytesIO()
                figure.savefig(content, format="png", dpi=110)
                pictures[f"{name}-{kind}.png"] = content.getvalue()
    return pictures


def draw_speed(record: Record) -> "Figure | None":
    """Decode speed against plain decoding: a panel for each batch size and temperature.

    In a panel each workload has a group of bars, each method a bar.
    """
    cells = _measured(record)
    methods = [name for name in record["plan"]["methods"] if name != "ar"]
    if not cells or not methods:
        return None
    panels: dict[str, list[Record]] = {}
    for cell in cells:
        panels.setdefault(_setting(cell, record), []).append(cell)
    groups = max(map(len, panels.values()))
    figure = _bare_figure(1.4 + 0.36 * groups * (len(methods) + 1), 1.5 + 2.9 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    for axes, (setting, own) in zip(grid, panels.items(), strict=True):
        for index, method in enumerate(methods):
            offset = (index - (len(methods) - 1) / 2) * 0.85 / len(methods)
            _draw_bars(axes, own, method, index, offset, 0.8 / len(methods))
        axes.axhline(1, color="black", linewidth=0.9, linestyle="--")
        axes.margins(y=0.14)
        axes.set_xticks(range(len(own)), [_workload(cell, own) for cell in own])
        axes.set_ylabel("plain decoding = 1")
        axes.set_title(setting, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Decode speed by workload and method (whiskers: slowest and fastest prompts)", fontsize=10
    )
    _legend(figure, grid[0])
    return figure


def _draw_bars(
    axes: "Axes", cells: list[Record], method: str, index: int, offset: float, width: float
) -> None:
    """One method's bar in each cell's group."""
    places = [place + offset for place in range(len(cells))]
    figures = [cell["methods"][method] for cell in cells]
    ratios = [one["decode_ratio_to_ar"] for one in figures]
    spreads = list(zip(ratios, (one["decode_ratio_spread"] for one in figures), strict=True))
    lows = [ratio - min(ratio, spread[0]) for ratio, spread in spreads]
    highs = [max(ratio, spread[2]) - ratio for ratio, spread in spreads]
    axes.bar(
        places,
        ratios,
        width,
        yerr=[lows, highs],
        label=method,
        hatch=_HATCHES[index % len(_HATCHES)],
        color=_COLOURS[index % len(_COLOURS)],
        edgecolor="black",
        linewidth=0.7,
        error_kw={"linewidth": 0.9, "capsize": 2},
    )
    for place, ratio, high in zip(places, ratios, highs, strict=True):
        told = f" {ratio:.2f}"
        axes.text(place, ratio + high, told, ha="center", va="bottom", fontsize=7, rotation=90)


def draw_hits(record: Record) -> "Figure | None":
    """The share of outcomes that were prepared, against how many guesses there were for each.

    Of several batch sizes the smallest is shown, here and for acceptance.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in _smallest_batch(record):
        for name, one in cell["methods"].items():
            if "outcomes" in one:
                options = _options(name)
                guesses = _mean_fan_out(options.get("f", ""))
                label = ", ".join(
                    [_label(cell, record).replace("\n", ", ")]
                    + [f"{key}={options[key]}" for key in ("k", "fallback") if key in options]
                )
                lines.setdefault(label, []).append((guesses, one["hit_rate"]))
    if not lines:
        return None
    figure, axes = _figure(7.5, 4.6)
    for index, (label, points) in enumerate(lines.items()):
        _line(axes, sorted(points), label, index)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("bonus tokens guessed for each number of accepted tokens (mean of the fan-out)")
    axes.set_ylabel("outcomes that were prepared")
    axes.set_title("Hit rate against fan-out")
    _legend(figure, axes)
    return figure


def draw_acceptance(record: Record) -> "Figure | None":
    """The share of drafts whose first 1, 2, ... tokens were accepted, a panel for each cell."""
    cells = [
        cell
        for cell in _smallest_batch(record)
        if any("drafters" in one for one in cell["methods"].values())
    ]
    if not cells:
        return None
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure = _bare_figure(4.3 * columns + 0.6, 3.3 * rows + 1.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    drawn: dict[str, int] = {}
    for axes, cell in zip(grid.flat, cells, strict=False):
        for name, one in cell["methods"].items():
            for drafter, own in one.get("drafters", {}).items():
                shares = own["accepted_at_position"] or []
                while shares and shares[-1] == 0:
                    shares = shares[:-1]
                if shares:
                    label = name if len(one["drafters"]) == 1 else f"{name}: {drafter}"
                    index = drawn.setdefault(label, len(drawn))
                    _line(axes, list(enumerate(shares, 1)), label, index)
        axes.set_title(_label(cell, record).replace("\n", ", "), fontsize=9)
        axes.set_xlabel("position in the draft")
        axes.set_ylim(0, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in list(grid.flat)[len(cells) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylabel("drafts accepted up to here")
    figure.suptitle("Acceptance by position", fontsize=11)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_batches(record: Record) -> "Figure | None":
    """Tokens a second of all rows together, against how many rows there are."""
    sizes = record["plan"]["batches"]
    cells = [
        cell for cell in _measured(record) if cell["temperature"] == _first_temperature(record)
    ]
    if len(sizes) < 2 or not cells:
        return None
    names = list(dict.fromkeys(cell["workload"] for cell in cells))
    figure = _bare_figure(4.6 * min(3, len(names)) + 0.6, 3.4 * math.ceil(len(names) / 3) + 1.2)
    grid = figure.subplots(math.ceil(len(names) / 3), min(3, len(names)), squeeze=False)
    for axes, workload in zip(grid.flat, names, strict=False):
        own = [cell for cell in cells if cell["workload"] == workload]
        for index, method in enumerate(record["plan"]["methods"]):
            points = [(c["batch"], c["methods"][method]["decode_tokens_per_s"]) for c in own]
            _line(axes, sorted(points), method, index)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_title(workload, fontsize=9)
        axes.set_xlabel("requests decoded together")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylabel("tokens a second, all rows")
    figure.suptitle("Throughput against batch", fontsize=11)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def draw_rounds(record: Record) -> "Figure | None":
    """Rounds of SSD as they were measured: a strip with two lanes for each method and cell."""
    strips = [
        (f"{_label(cell, record)}\n{name}".replace("\n", ", "), timeline)
        for cell in _measured(record)
        for name, timeline in cell["timelines"].items()
        if len(timeline["rounds"]) > 2
    ]
    if not strips:
        return None
    figure = _bare_figure(12.0, 1.3 + 1.65 * len(strips))
    grid = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axes, (title, timeline) in zip(grid, strips, strict=True):
        _draw_strip(axes, timeline["rounds"][1 : MOST_ROUNDS + 1])
        efficiency = (timeline["summary"] or {}).get("overlap_efficiency")
        told = "" if efficiency is None else f"; overlap efficiency {efficiency:.0%}"
        axes.set_title(f"{title}{told}", fontsize=9, loc="left")
    grid[-1].set_xlabel("milliseconds")
    handles, labels = grid[0].get_legend_handles_labels()
    told_apart = dict(zip(labels, handles, strict=True))
    figure.legend(
        told_apart.values(), told_apart.keys(), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def _draw_strip(axes: "Axes", rounds: list[Record]) -> None:
    """Target above draft; the number on a verification is how many drafted tokens stood."""
    origin = rounds[0]["propose"][0]
    bar = {"height": 0.66, "edgecolor": "black", "linewidth": 0.6}
    for one in rounds:
        propose = "look up: hit" if one["is_hit"] else "look up: miss, then fallback"
        colour, hatch = ("#1d7a46", "") if one["is_hit"] else ("#f2a03d", "/////")
        for part, lane, label, style in (
            ("verify", 1, "verify (tokens accepted)", {"color": "#2f6db0"}),
            ("prepare", 0, "prepare", {"color": "#e4eed2"}),
            ("propose", 0, propose, {"color": colour, "hatch": hatch}),
        ):
            start, end = one[part]
            axes.barh(
                lane, (end - start) * 1e3, left=(start - origin) * 1e3, label=label, **style, **bar
            )
        start, end = one["verify"]
        told = ",".join(str(count) for count in one["accepted"])
        middle = ((start + end) / 2 - origin) * 1e3
        axes.text(middle, 1, told, ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks([0, 1], ["draft", "target"])
    axes.set_ylim(-0.5, 1.5)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: "Axes", points: list[tuple[float, float]], label: str, index: int) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(
        xs,
        ys,
        label=label,
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_LINES[index % len(_LINES)],
        color=_COLOURS[index % len(_COLOURS)],
        markeredgecolor="black",
        markeredgewidth=0.5,
        linewidth=1.3,
    )
    axes.grid(alpha=0.3)


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure = _bare_figure(width, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bare_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(min(max(width, 6.5), 16.0), height), layout="constrained")


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, int(figure.get_figwidth() // 2.6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _measured(record: Record) -> list[Record]:
    return [cell for cell in record["cells"] if cell["units"]]


def _smallest_batch(record: Record) -> list[Record]:
    """The cells of the smallest batch size."""
    smallest = min(record["plan"]["batches"])
    return [cell for cell in _measured(record) if cell["batch"] == smallest]


def _setting(cell: Record, record: Record) -> str:
    """The cell's batch size and, if several were asked for, its temperature."""
    told = f"batch {cell['batch']}"
    several = len(record["plan"]["temperatures"]) > 1
    return f"{told}, temperature {cell['temperature']:g}" if several else told


def _workload(cell: Record, cells: list[Record]) -> str:
    """The cell's workload, and its temperature where not all of a panel have the same."""
    several = len({one["temperature"] for one in cells}) > 1
    return f"{cell['workload']}\n(T {cell['temperature']:g})" if several else cell["workload"]


def _label(cell: Record, record: Record) -> str:
    """The cell's workload, and what else tells it from the others."""
    plan, parts = record["plan"], [cell["workload"]]
    if len(plan["temperatures"]) > 1:
        parts.append(f"T {cell['temperature']:g}")
    if len(plan["batches"]) > 1:
        parts.append(f"batch {cell['batch']}")
    return "\n".join(parts)


def _first_temperature(record: Record) -> float:
    return record["cells"][0]["temperature"] if record["cells"] else 0.0


def _options(method: str) -> dict[str, str]:
    """The options in a method's name."""
    tail = method.partition(":")[2]
    return {part.partition("=")[0]: part.partition("=")[2] for part in tail.split(",") if part}


def _mean_fan_out(text: str) -> float:
    """The mean of a fan-out as a method's name gives it; the engine's own without one."""
    from ssd_jax.engine.ssd_options import DEFAULT_GUESSES

    counts = [int(part) for part in text.split("-")] if text else [DEFAULT_GUESSES]
    return sum(counts) / len(counts)
