"""`generate --timeline`: a decoding's rounds as a picture or as a trace."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssd_jax.cli.busy import busy
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.timeline.picture import check_drawable, timeline_png
from ssd_jax.timeline.rounds import TimelineSummary, record_rounds, summarize
from ssd_jax.timeline.trace import trace_json
from ssd_jax.whole_file import write_whole


def write_timeline(
    model: Model,
    ssd: SSD,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    args: argparse.Namespace,
) -> None:
    """Decode the prompt twice more, once in lockstep; write its timeline, sum it up on stderr.

    Raises:
        ConfigError: a picture is asked for without matplotlib, or the file cannot be written.
    """
    path = Path(args.timeline)
    as_picture = path.suffix == ".png"
    if as_picture:
        check_drawable()
    with busy("decoding twice more for the timeline", quiet=args.quiet):
        rounds, lockstep = (
            record_rounds(model, ssd, [prompt_ids], params, lockstep=lockstep)
            for lockstep in (False, True)
        )
    content = timeline_png(rounds, ssd, lockstep) if as_picture else trace_json(rounds).encode()
    write_whole(path, content)
    summary = summarize(rounds, lockstep)
    if summary is not None and not args.quiet:
        print(_describe(summary), file=sys.stderr)


def _describe(summary: TimelineSummary) -> str:
    """The summary as one line."""
    parts = [
        f"{summary.num_rounds} rounds of {summary.round_s * 1e3:.2f} ms (median)",
        f"verify {summary.verify_s * 1e3:.2f} ms",
        f"prepare {summary.prepare_s * 1e3:.2f} ms",
    ]
    for name, seconds in (("hit", summary.hit_s), ("miss", summary.miss_s)):
        if seconds is not None:
            parts.append(f"proposing after a {name} {seconds * 1e3:.2f} ms")
    for name, share in (
        ("hits", summary.hit_rate),
        ("after a hit", summary.hit_rate_after_hit),
        ("after a miss", summary.hit_rate_after_miss),
    ):
        if share is not None:
            parts.append(f"{share:.0%} {name}")
    if summary.overlap_efficiency is not None:
        parts.append(f"overlap efficiency {summary.overlap_efficiency:.0%}")
    parts.append(f"the target waited for the draft in {summary.waiting_share:.0%} of the rounds")
    return ", ".join(parts)
