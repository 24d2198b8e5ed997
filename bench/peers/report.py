"""The report of a comparison with peers in Markdown."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.peers.contenders import OURS
from bench.peers.resuming import SCHEMA
from bench.record import require_kind

Record = dict[str, Any]


def require_peers(record: Record, path: Path) -> None:
    """Refuse what is not a record of `bench peers` in the present schema.

    Raises:
        RequestError: naming what it is instead.
    """
    require_kind(record, path, "peers", SCHEMA)


def describe_peers(record: Record) -> Iterator[str]:
    """What was compared, the table of contenders, whether outputs agree, best against best."""
    yield _conditions(record)
    if record["units"]:
        yield contender_table(record)
        yield from _agreement(record)
        yield from _best(record)
    yield from _absent(record)


def contender_table(record: Record) -> str:
    """Speed of every contender beside our plain decoding; each engine's fastest is bold."""
    head = (
        "engine",
        "method",
        "tokens/s",
        "against our plain decoding",
        "over prompts",
        "first tokens ms",
        "accepted of drafted",
        "outputs that differ",
    )
    fastest = {one["contender"] for one in record["best"].values()}
    rows = []
    for name, one in record["contenders"].items():
        peer, _, method = name.partition("/")
        speed = f"{one['decode_tokens_per_s']:.{_decimals(one['decode_tokens_per_s'])}f}"
        first = one["first_s_spread"]
        rows.append(
            (
                _engine(peer),
                method,
                f"**{speed}**" if name in fastest else speed,
                f"{one['decode_ratio_to_ours_ar']:.2f}",
                _range(one["decode_ratio_to_ours_ar_spread"]),
                "" if first is None else f"{first[1] * 1e3:.1f}",
                _share(one["num_accepted_tokens"], one["num_draft_tokens"]),
                str(one["outputs_that_differ"]),
            )
        )
    return table(head, rows)


def _conditions(record: Record) -> str:
    plan, versions = record["plan"], record["versions"]
    lengths = [unit["prompt_tokens"] for unit in record["units"]]
    parts = [
        f"Target {plan['model']} ({record['target_parameters'] / 1e6:.1f} M weights)",
        f"{plan['dtype']}, {plan['threads']} threads" if plan["threads"] > 1 else plan["dtype"],
        f"{len(lengths)} prompts of {plan['prompts']}",
        f"{plan['max_tokens']} tokens an answer, greedy",
        f"medians of {plan['rounds']} turns",
    ]
    if plan["draft_model"] is not None:
        parts.insert(1, f"draft {plan['draft_model']}")
    if lengths:
        parts[-3] += f", {min(lengths)} to {max(lengths)} tokens"
    known = [
        f"{name} {version.removeprefix('version: ')}"
        for one in versions.values()
        for name, version in one.items()
    ]
    return "; ".join(parts) + ". With " + ", ".join(known) + "."


def _agreement(record: Record) -> Iterator[str]:
    """Whether all outputs are the same, else where those that are not first differ."""
    differing = {
        name: one["first_differences"]
        for name, one in record["contenders"].items()
        if one["outputs_that_differ"]
    }
    by_text = any(
        turns["output"]["tokens"] is None
        for unit in record["units"]
        for turns in unit["turns"].values()
    )
    how = "token for token" + (" (a server without ids: by its text)" if by_text else "")
    number = len(record["units"])
    if not differing:
        yield f"All outputs of all contenders are the same, {how}."
        return
    same = [name for name in record["contenders"] if name not in differing]
    yield f"The outputs of {', '.join(same)} are the same, {how}."
    yield "\n".join(
        f"- {name}: {len(places)} of {number} outputs differ from our plain decoding's, first "
        f"after {min(places)} to {max(places)}."
        for name, places in differing.items()
    )


def _best(record: Record) -> Iterator[str]:
    ours = record["best"][OURS]["contender"]
    lines = [
        f"- {one['ours_over_it']:.2f} times {one['contender']} (over prompts "
        f"{_range(one['ours_over_it_spread'])}; of each prompt's fastest turns "
        f"{one['ours_over_it_by_fastest_turns']:.2f})"
        for peer, one in record["best"].items()
        if peer != OURS
    ]
    if lines:
        yield f"Our fastest, {ours}, against the fastest of each:\n\n" + "\n".join(lines)


def _absent(record: Record) -> Iterator[str]:
    lines = [f"- {peer} was skipped: {reason}" for peer, reason in record["skipped"].items()]
    lines += [f"- {name} was left out: {reason}" for name, reason in record["failed"].items()]
    if lines:
        yield "\n".join(lines)


def _engine(peer: str) -> str:
    return "ssd-jax" if peer == OURS else peer


def _decimals(speed: float) -> int:
    return 0 if speed >= 100 else 1


def _range(spread: Sequence[float]) -> str:
    return f"{spread[0]:.2f} to {spread[-1]:.2f}"


def _share(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.0%}" if whole and part is not None else ""
