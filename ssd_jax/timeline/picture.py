"""A timeline as a picture: a lane for the target, a lane for the draft, hits told from misses."""

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import ConfigError
from ssd_jax.timeline.rounds import Round, TimelineSummary, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROUNDS = 24  # more would be too narrow to read
FIRST_ROUND = 2  # the first ones still fill the pipeline
STRIPS = 3  # the rounds are broken into so many lines
_TARGET_LANE, _DRAFT_LANE, _HEIGHT = 1.0, 0.0, 0.62
_VERIFY, _PREPARE, _HIT, _MISS = "#2f6db0", "#cfe3b4", "#1d7a46", "#f2a03d"


def check_drawable() -> None:
    """Refuse to draw where there is nothing to draw with.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "A picture needs matplotlib, which is not installed: install ssd-jax[plot], or name a "
            ".json file for a trace."
        )


def timeline_png(
    rounds: Sequence[Round], ssd: SSD, lockstep: Sequence[Round] | None = None
) -> bytes:
    """The rounds of an SSD decoding as a PNG; `lockstep` as for `summarize`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_drawable()
    from matplotlib.figure import Figure

    first = FIRST_ROUND if len(rounds) > FIRST_ROUND + 3 else 0
    shown = rounds[first : first + MOST_ROUNDS]
    per_strip = math.ceil(len(shown) / STRIPS)
    strips = [shown[at : at + per_strip] for at in range(0, len(shown), per_strip)]
    figure = Figure(figsize=(13, 1.4 + 1.75 * len(strips)), dpi=110, layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    width = 1.01e3 * max(_end(strip) - strip[0].propose.start for strip in strips)
    for index, (axis, strip) in enumerate(zip(axes, strips, strict=True)):
        _draw_strip(axis, strip, first + index * per_strip, width)
    axes[-1].set_xlabel("milliseconds since the first round shown in the line")
    _add_legend(figure)
    figure.suptitle(_title(ssd, summarize(rounds, lockstep)), fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_strip(axis: "Axes", strip: Sequence[Round], first: int, width: float) -> None:
    """Consecutive rounds, the first of them number `first`, in an axis so many ms wide."""
    origin = strip[0].propose.start
    for index, one in enumerate(strip, first):
        starts, lengths = zip(
            *(
                ((part.start - origin) * 1e3, part.seconds * 1e3)
                for part in (one.propose, one.verify, one.prepare)
            ),
            strict=True,
        )
        hit = one.is_hit
        bar = {"height": _HEIGHT, "edgecolor": "black", "linewidth": 0.6}
        axis.barh(_TARGET_LANE, lengths[1], left=starts[1], color=_VERIFY, **bar)
        axis.barh(_DRAFT_LANE, lengths[2], left=starts[2], color=_PREPARE, **bar)
        style = {"color": _HIT} if hit else {"color": _MISS, "hatch": "////"}
        axis.barh(_DRAFT_LANE, lengths[0], left=starts[0], **style, **bar)
        axis.text(
            starts[1] + lengths[1] / 2,
            _TARGET_LANE,
            "+" + ", ".join(str(row.num_accepted) for row in one.rows),
            ha="center",
            va="center",
            color="white",
            fontsize=9,
            fontweight="bold",
        )
        axis.plot(
            starts[0] + lengths[0] / 2,
            _DRAFT_LANE + _HEIGHT / 2 + 0.1,
            marker="o" if hit else "v",
            markersize=5,
            color=_HIT if hit else _MISS,
            markeredgecolor="black",
            markeredgewidth=0.5,
        )
        axis.axvline(starts[0], color="0.75", linewidth=0.6, zorder=0)
        axis.text(starts[0], 1.42, f"{index}", fontsize=7, color="0.35", ha="left", va="bottom")
    axis.set_yticks([_DRAFT_LANE, _TARGET_LANE], ["draft", "target"])
    axis.set_ylim(-0.45, 1.65)
    axis.set_xlim(0, width)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _add_legend(figure: "Figure") -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(shape: str, color: str) -> Line2D:
        return Line2D([], [], marker=shape, color=color, linestyle="", markeredgecolor="black")

    entries = {
        "verify (+ accepted tokens)": Patch(facecolor=_VERIFY, edgecolor="black"),
        "prepare": Patch(facecolor=_PREPARE, edgecolor="black"),
        "look up: hit": (Patch(facecolor=_HIT, edgecolor="black"), mark("o", _HIT)),
        "look up, then fallback: miss": (
            Patch(facecolor=_MISS, edgecolor="black", hatch="////"),
            mark("v", _MISS),
        ),
    }
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        handler_map={tuple: HandlerTuple(ndivide=None)},
    )


def _title(ssd: SSD, summary: TimelineSummary | None) -> str:
    fan_out = ssd.both_fan_outs
    title = (
        f"draft_len {ssd.draft_len}, {fan_out.num_branches} outcomes prepared "
        f"({', '.join(map(str, fan_out.after_hit))}), {ssd.fallback} fallback"
    )
    if summary is None:
        return title
    hit_rate = "" if summary.hit_rate is None else f"{summary.hit_rate:.0%} hits, "
    return (
        f"{title}\n{summary.num_rounds} rounds, {hit_rate}{summary.mean_accepted:.2f} drafted "
        f"tokens accepted a round; medians: round {summary.round_s * 1e3:.2f} ms, verify "
        f"{summary.verify_s * 1e3:.2f} ms, prepare {summary.prepare_s * 1e3:.2f} ms"
        + (
            ""
            if summary.overlap_efficiency is None
            else f"; overlap efficiency {summary.overlap_efficiency:.0%}"
        )
    )


def _end(strip: Sequence[Round]) -> float:
    return max(strip[-1].verify.end, strip[-1].prepare.end)
