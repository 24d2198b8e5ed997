"""Simulated figures beside the published ones, each marked as fitted or predicted."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from bench.simulate import published
from bench.simulate.calibrate import (
    FIT_BATCH,
    Calibration,
    costs_on_h100,
    fit_acceptance,
    fit_batch_acceptance,
    geometric_laws,
    uniform_ssd,
)
from bench.simulate.costs import ChipCosts
from bench.simulate.methods import SimulatedMethod
from bench.simulate.outcomes import OutcomeLaws
from bench.simulate.published import PublishedTable
from bench.simulate.rounds import Work, expected_rate, simulate

TOLERANCE = 0.10
_TRIED = range(2, 11)  # draft lengths among which the best is looked for
_WORK = Work(tokens=512, runs=128)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure, in tokens a second.

    Attributes:
        group: whose figures, for which models.
        figure: the method, and what it answered.
        fitted: a constant was fitted to it, so that it proves nothing.
        promised: it should be within `TOLERANCE`.
    """

    group: str
    figure: str
    published: float
    simulated: float
    fitted: bool
    promised: bool = True

    @property
    def error(self) -> float:
        """By how much more was simulated, as a share."""
        return self.simulated / self.published - 1

    @property
    def holds(self) -> bool:
        """Whether it is as near as was promised, if it was."""
        return not self.promised or abs(self.error) <= TOLERANCE


def compare_published(calibration: Calibration) -> list[Comparison]:
    """All published tables."""
    rows = [row for table in published.TABLES for row in _compare_table(calibration, table)]
    return [*rows, *_compare_log(calibration), *compare_batches(calibration)]


def best_draft_len(costs: ChipCosts, calibration: Calibration, acceptances: Sequence[float]) -> int:
    """The draft length with the highest mean speed over these acceptances, with fan-out 3."""

    def mean_rate(draft_len: int) -> float:
        method = uniform_ssd(draft_len, published.PROFILED_GUESSES)
        return statistics.mean(
            expected_rate(method, costs, geometric_laws(draft_len, a, calibration.guesses))
            for a in acceptances
        )

    return max(_TRIED, key=mean_rate)


def table_acceptances(calibration: Calibration, table: PublishedTable) -> list[float]:
    """The acceptance of each data set, from its synchronous speculation."""
    costs = _costs(calibration, table.target, table.draft_model)
    return [fit_acceptance(costs, table.draft_len, speed) for speed in table.draft]


def _compare_table(calibration: Calibration, table: PublishedTable) -> Iterable[Comparison]:
    costs = _costs(calibration, table.target, table.draft_model)
    acceptances = table_acceptances(calibration, table)
    source = "paper" if table.source == published.PAPER else "reproduction"
    group = f"{source}: {table.pair}"
    fitted_ar = table is published.TABLES[0]
    yield Comparison(
        group=group,
        figure="plain",
        published=table.ar,
        simulated=_speed(SimulatedMethod(), costs, None),
        fitted=fitted_ar,
    )
    runs = [(False, table.draft_len, table.draft, table.draft_mean)]
    for told, speeds in table.ssd.items():
        draft_len = told or best_draft_len(costs, calibration, acceptances)
        runs.append((True, draft_len, speeds, table.ssd_mean[told]))
    for is_ssd, draft_len, speeds, mean in runs:
        method = SimulatedMethod(draft_len=draft_len)
        name = f"draft, k={draft_len}"
        if is_ssd:
            method = uniform_ssd(draft_len, published.PROFILED_GUESSES)
            best = " (best)" if None in table.ssd else ""
            name = f"SSD, k={draft_len}{best}"
        simulated = [
            _speed(method, costs, geometric_laws(draft_len, a, calibration.guesses))
            for a in acceptances
        ]
        for dataset, theirs, ours in zip(published.DATASETS, speeds, simulated, strict=True):
            yield Comparison(
                group=group,
                figure=f"{name}, {dataset}",
                published=theirs,
                simulated=ours,
                fitted=not is_ssd,
            )
        yield Comparison(
            group=group,
            figure=f"{name}, mean",
            published=mean,
            simulated=statistics.mean(simulated),
            fitted=not is_ssd,
        )


def _compare_log(calibration: Calibration) -> Iterable[Comparison]:
    """The reference log's other figures, of an earlier engine and few prompts: no promise."""
    for target, draft, plain, draft_len, draft_speed, guesses, ssd in published.LOG_SPEEDS:
        costs = _costs(calibration, target, draft)
        acceptance = fit_acceptance(costs, draft_len, draft_speed)
        laws = geometric_laws(draft_len, acceptance, calibration.guesses)
        figures = (
            ("plain", SimulatedMethod(), plain, False),
            (f"draft, k={draft_len}", SimulatedMethod(draft_len=draft_len), draft_speed, True),
            (f"SSD, k={draft_len}, fan-out {guesses}", uniform_ssd(draft_len, guesses), ssd, False),
        )
        for name, method, speed, fitted in figures:
            yield Comparison(
                group=f"reference log: {target} / {draft}",
                figure=f"{name}, GSM8K",
                published=speed,
                simulated=_speed(method, costs, laws),
                fitted=fitted,
                promised=False,
            )


def compare_batches(calibration: Calibration) -> list[Comparison]:
    """The reference log's batches, tokens a second of all rows."""
    latencies, engine, guesses = calibration.latencies, calibration.engine, calibration.guesses
    acceptance = fit_batch_acceptance(latencies, engine, guesses)
    draft_len = published.BATCH_DRAFT_LEN
    method = uniform_ssd(draft_len, published.PROFILED_GUESSES)
    laws = geometric_laws(draft_len, acceptance, guesses)
    rows = []
    for batch, speed in published.BATCH_SPEEDS.items():
        costs = _costs(calibration, "llama-3.1-70b", "llama-3.2-1b", batch)
        work = Work(rows=batch, answers=published.BATCH_ANSWERS[batch], tokens=512, runs=32)
        rows.append(
            Comparison(
                group="reference log: batches of llama-3.1-70b / llama-3.2-1b",
                figure=f"SSD, k={draft_len}, {batch} rows",
                published=speed,
                simulated=simulate(method, costs, laws, work).tokens_per_s,
                fitted=batch in (FIT_BATCH, max(published.BATCH_SPEEDS)),
                promised=False,
            )
        )
    return rows


def _costs(calibration: Calibration, target: str, draft: str, batch: int = 1) -> ChipCosts:
    return costs_on_h100(calibration.latencies, calibration.engine, target, draft, batch)


def _speed(method: SimulatedMethod, costs: ChipCosts, laws: OutcomeLaws | None) -> float:
    return simulate(method, costs, laws, _WORK).tokens_per_s
