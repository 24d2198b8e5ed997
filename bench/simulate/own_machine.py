"""Our own measured speeds beside those that follow from the times of the parts alone."""

from bench.simulate.comparison import Comparison
from bench.simulate.methods import SimulatedMethod, parse_simulated
from bench.simulate.outcomes import OutcomeLaws, summary_laws
from bench.simulate.records import Cells, MeasuredSpeed, PartsRecord
from bench.simulate.rounds import Work, simulate
from ssd_jax.errors import RequestError

_TOKENS = 2048  # so many that opening and ending an answer do not count
_KINDS = ("ar", "draft", "ssd")


def compare_own(record: PartsRecord, cells: Cells) -> list[Comparison]:
    """The measured methods that can be simulated; others (n-grams, for one) are left out.

    Of plain decoding the pass is its own time, so that it counts as fitted. What the others accept
    and find is as measured; what a round lasts is predicted.
    """
    rows = []
    for workload, speeds in cells.items():
        for name, speed in speeds.items():
            if not _can_simulate(name):
                continue
            method = parse_simulated(name)
            laws = measured_laws(method, name, speed)
            work = Work(rows=record.batch, tokens=_TOKENS, runs=32)
            rows.append(
                Comparison(
                    group=f"own: {record.source}, {workload}",
                    figure=name,
                    published=speed.tokens_per_s,
                    simulated=simulate(method, record.costs, laws, work).tokens_per_s,
                    fitted=method.draft_len == 0,
                )
            )
    return rows


def measured_laws(method: SimulatedMethod, name: str, speed: MeasuredSpeed) -> OutcomeLaws | None:
    """Laws with the tokens a round and the hit rate that were measured.

    Raises:
        RequestError: they are not told.
    """
    if method.draft_len == 0:
        return None
    if speed.tokens_per_round is None or (method.fan_out and speed.hit_rate is None):
        raise RequestError(
            f"Of {name} it must be told tokens_per_target_step, and hit_rate if it is ssd: take a "
            "record of `ssd-jax bench run`."
        )
    return summary_laws(method.draft_len, speed.tokens_per_round, speed.hit_rate or 0.0)


def _can_simulate(name: str) -> bool:
    kind, _, options = name.partition(":")
    return kind in _KINDS and "auto" not in options and "accept" not in options
