"""A timeline in the Trace Event format, which Perfetto and Chrome's tracing page show."""

from collections.abc import Sequence

from ssd_jax.json_text import to_json
from ssd_jax.timeline.rounds import Interval, Round

TARGET, DRAFT = 1, 2  # threads of the one process; the order in which they are shown


def trace_json(rounds: Sequence[Round]) -> str:
    """The timeline as a JSON text: one process with a thread for each device, microseconds."""
    events: list[dict[str, object]] = [
        _name("process_name", 0, "ssd-jax"),
        _name("thread_name", TARGET, "target"),
        _name("thread_name", DRAFT, "draft"),
    ]
    for index, one in enumerate(rounds):
        hits = [row.was_hit for row in one.rows]
        accepted = [row.num_accepted for row in one.rows]
        details = {"round": index, "prepared": hits, "accepted": accepted}
        kind = "hit" if one.is_hit else "miss"
        events += [
            _span(f"propose ({kind})", DRAFT, one.propose, details),
            _span("verify", TARGET, one.verify, details),
            _span("prepare", DRAFT, one.prepare, details),
        ]
    return to_json({"traceEvents": events, "displayTimeUnit": "ms"})


def _name(kind: str, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": 1, "tid": thread, "args": {"name": name}}


def _span(
    name: str, thread: int, interval: Interval, details: dict[str, object]
) -> dict[str, object]:
    return {
        "ph": "X",
        "name": name,
        "cat": "round",
        "pid": 1,
        "tid": thread,
        "ts": interval.start * 1e6,
        "dur": interval.seconds * 1e6,
        "args": details,
    }
