"""The simulator's results as pictures that need no colour: markers, dashes and words tell apart."""

import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.simulate.comparison import TOLERANCE, Comparison
from bench.simulate.scale import Point
from ssd_jax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of each line: grey, marker, dashes.
_STYLES = {
    ("plain", 0): ("#777777", "s", ":"),
    ("draft", 0): ("#444444", "^", "--"),
    ("SSD", 1): ("black", "o", "-"),
    ("SSD", 2): ("black", "D", "-."),
    ("SSD", 4): ("black", "*", (0, (1, 1))),
}
_OTHER = ("black", "x", "-")


def check_drawable() -> None:
    """Refuse to draw where there is nothing to draw with.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "Plots need matplotlib, which is not installed: install ssd-jax[plot], or leave the "
            "plots out."
        )


def plot_comparison(rows: Sequence[Comparison], path: Path) -> None:
    """Every figure's difference, in its group; what was fitted is hollow."""
    groups = [
        (group, list(members)) for group, members in itertools.groupby(rows, lambda one: one.group)
    ]
    heights = [len(members) + 1.5 for _, members in groups]
    figure = _figure(9, 0.19 * sum(heights) + 1.2)
    axes = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axis, (group, members) in zip(axes, groups, strict=True):
        _draw_differences(axis, group, members)
    widest = max(0.15, *(abs(row.error) + 0.02 for row in rows)) * 100
    axes[-1].set_xlim(-widest, widest)
    axes[-1].set_xlabel("simulated against measured speed, %")
    figure.suptitle("tokens/s, measured / simulated", fontsize=10, x=0.02, ha="left")
    handles = [
        axes[0].plot([], [], "o", color="black", markersize=6, label="predicted")[0],
        axes[0].plot(
            [], [], "o", color="black", fillstyle="none", markersize=6, label="fitted to this"
        )[0],
    ]
    handles.append(axes[0].fill_between([], [], color="#eeeeee", label=f"within {TOLERANCE:.0%}"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)


def _draw_differences(axis: "Axes", group: str, members: Sequence[Comparison]) -> None:
    places = range(len(members), 0, -1)
    for place, row in zip(places, members, strict=True):
        axis.plot([0, row.error * 100], [place, place], color="#999999", linewidth=1)
        axis.plot(
            row.error * 100,
            place,
            marker="o",
            markersize=6,
            color="black",
            fillstyle="none" if row.fitted else "full",
        )
    axis.set_yticks(
        list(places),
        [f"{row.figure}   {row.published:.4g} / {row.simulated:.4g}" for row in members],
        fontsize=7,
    )
    axis.axvspan(-TOLERANCE * 100, TOLERANCE * 100, color="#eeeeee", zorder=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_ylim(0.2, len(members) + 0.8)
    axis.set_title(group, fontsize=8, loc="left", pad=3)
    axis.tick_params(axis="y", length=0)


def plot_draft_lens(
    measured: dict[int, float], simulated: dict[int, float], title: str, path: Path
) -> None:
    """SSD's speed against the draft length, measured and simulated."""
    figure = _figure(6, 4)
    axis = figure.subplots()
    lengths = sorted(simulated)
    axis.plot(
        lengths,
        [simulated[k] for k in lengths],
        color="black",
        linestyle="--",
        marker="o",
        fillstyle="none",
        label="simulated",
    )
    axis.plot(
        sorted(measured),
        [measured[k] for k in sorted(measured)],
        color="black",
        linestyle="none",
        marker="x",
        markersize=9,
        markeredgewidth=2,
        label="measured",
    )
    axis.set_xlabel("draft length k")
    axis.set_ylabel("tokens/s, mean of four data sets")
    axis.set_ylim(0)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)


def plot_scale(pairs: Sequence[tuple[str, Sequence[Point]]], title: str, path: Path) -> None:
    """Speed of a row and of a chip against the batch, a line of pictures for each pair."""
    figure = _figure(11, 3.4 * len(pairs) + 0.8)
    axes = figure.subplots(len(pairs), 2, squeeze=False)
    for (name, points), (left, right) in zip(pairs, axes, strict=True):
        _draw_batches(left, points, "tokens/s a row", per_chip=False)
        _draw_batches(right, points, "tokens/s a chip, over plain decoding", per_chip=True)
        left.set_title(name, fontsize=10, loc="left")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _draw_batches(axis: "Axes", points: Sequence[Point], label: str, *, per_chip: bool) -> None:
    kinds = list(dict.fromkeys((point.kind, point.draft_chips) for point in points))
    fewest = min(number for kind, number in kinds if kind == "SSD")
    plain = {one.rows: one.per_chip for one in points if one.kind == "plain"}
    for kind, draft_chips in kinds:
        line = [one for one in points if (one.kind, one.draft_chips) == (kind, draft_chips)]
        grey, marker, dashes = _STYLES.get((kind, draft_chips), _OTHER)
        rows = [point.rows for point in line]
        units = [plain[one.rows] * one.chips if per_chip else one.rows for one in line]
        chips = f"{line[0].chips} chip" + "s" * (line[0].chips > 1)

        def each(speeds: Iterable[float], units: list[float] = units) -> list[float]:
            return [speed / unit for speed, unit in zip(speeds, units, strict=True)]

        axis.plot(
            rows,
            each(one.simulated.tokens_per_s for one in line),
            color=grey,
            marker=marker,
            linestyle=dashes,
            label=f"{kind}, {chips}",
        )
        if kind == "SSD" and draft_chips == fewest:
            axis.fill_between(
                rows,
                each(one.low for one in line),
                each(one.high for one in line),
                facecolor="#dddddd",
                edgecolor="#999999",
                hatch="....",
                linewidth=0,
                label=f"SSD, {chips}: range of hit rates assumed",
            )
    axis.set_xscale("log", base=2)
    ticks = sorted({point.rows for point in points})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0)
    axis.set_xlabel("rows decoded together")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _figure(width: float, height: float) -> "Figure":
    check_drawable()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): name a folder that can be."
        ) from error
