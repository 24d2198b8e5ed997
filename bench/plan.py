"""What a run measures, fixed before it begins, and whether a record is of the same run."""

import dataclasses
from pathlib import Path
from typing import Any

from bench.methods import BenchMethod
from bench.prompt_sets import RANDOM, fingerprint
from bench.record import SCHEMA, begin_or_resume
from bench.workloads import Workload
from ssd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A grid: every method on every workload at every temperature and batch size.

    Attributes:
        model: the target's folder, "demo" for the bundled one; `draft_model` likewise.
        dtype: of the weights, None as the engine chooses.
        split: one half of the CPU's cores for the target, one for the draft of ssd.
        idle_layers: layers that change nothing, added to target and draft.
        methods: full names, plain decoding first.
        workloads: name, source, style and a hash of the prompts of each.
        temperatures: None is the workload's own.
        batches: how many prompts are decoded together.
        num_prompts: of each workload.
        max_tokens: of each answer, which goes on to the end whatever the model says.
        rounds: how often each batch is timed.
        host: also time the host's share.
        timeline: also record when the programs of ssd's rounds ran.
    """

    model: str
    draft_model: str
    dtype: str | None
    split: bool
    idle_layers: tuple[int, int]
    methods: tuple[str, ...]
    workloads: tuple[dict[str, str], ...]
    temperatures: tuple[float | None, ...]
    batches: tuple[int, ...]
    num_prompts: int
    max_tokens: int
    rounds: int
    host: bool
    timeline: bool

    def __post_init__(self) -> None:
        numbers = {
            "--num-prompts": self.num_prompts,
            "--max-tokens": self.max_tokens,
            "--rounds": self.rounds,
            "--batch": min(self.batches),
        }
        for flag, value in numbers.items():
            if value < 1:
                raise RequestError(f"{flag} must be at least 1, got {value}.")
        if min(self.idle_layers) < 0:
            raise RequestError(f"--idle-layers must be 0 or more, got {min(self.idle_layers)}.")
        if self.num_prompts < max(self.batches):
            raise RequestError(
                f"--num-prompts must fill the largest batch ({max(self.batches)}), got "
                f"{self.num_prompts}: raise it or lower --batch."
            )
        names = [workload["name"] for workload in self.workloads]
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f"Each workload can be named once, got {name} twice.")

    @property
    def num_passes(self) -> int:
        """Batches that are measured if every workload has prompts enough."""
        cells = len(self.workloads) * len(self.temperatures)
        return cells * sum(self.num_prompts // batch for batch in self.batches)


def describe_workload(workload: Workload) -> dict[str, str]:
    """What the plan says of a workload."""
    return {
        "name": workload.name,
        "source": workload.source,
        "style": workload.style,
        "prompts_sha256": fingerprint(workload),
    }


def refuse_guesses(workload: Workload, methods: list[BenchMethod]) -> None:
    """Refuse random tokens where speed depends on what is accepted of the drafts.

    Raises:
        RequestError: naming the first method that does not say how often.
    """
    for method in methods if workload.style == "random" else ():
        if method.guesses:
            raise RequestError(
                f"On random tokens no model agrees with another as it does on text, so {RANDOM} "
                f"needs methods with accept=RATE, got {method.name}: add it, or choose another "
                "workload."
            )


def open_record(plan: Plan, path: Path | None) -> dict[str, Any]:
    """The record to write into: the one in the file if it is of the same plan, else a new one.

    Raises:
        RequestError: the file holds something else, or measurements of another plan, commit or
            machine.
    """
    record = begin_or_resume("run", SCHEMA, dataclasses.asdict(plan), path)
    record.setdefault("cells", [])
    return record
