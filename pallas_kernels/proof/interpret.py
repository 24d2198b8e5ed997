"""Run kernel cases in Pallas' Mosaic GPU interpreter, on a CPU, with its race detection.

A case is a function that runs kernels with `params()` and returns figures. It runs in a process of
its own: the interpreter keeps state after an error, may hang after one, and starves on few cores
unless `NPROC` is set before JAX starts. Arguments and figures travel as JSON.

    outcome = run_case("forward_cases:accuracy", head_dim=128)
    outcome.figures["relative_rms"], outcome.races, outcome.error
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

# Fewer threads than blocked barrier waits and XLA's CPU pool never gets to the one that arrives.
_THREADS = "16"
# Copies and products that run beside the threads take turns in this many places of the vector
# clocks. Two in the same place look ordered though they are not: with JAX's 5, races go unseen.
_ASYNCHRONOUS_PLACES = 2048
_PLATFORMS = {"sm_100": "NVIDIA B200", "sm_90": "NVIDIA H200"}
_KEPT_LOG = 4000
_RACE = "RACE DETECTED"
_TOO_LATE = "no result after"
# What the interpreter's errors say about a rule of synchronisation that a kernel violates.
_RULES = {
    "deadlock": re.compile(_TOO_LATE),
    "barrier": re.compile(
        "no threads observed phase|only observed|is waiting at barrier|is awaiting phase|"
        "arrivals pending"
    ),
    "union": re.compile("ref unions are only safe"),
    "unfinished": re.compile("operations completed before|is used while its product is in flight"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a case: its figures, whether accesses raced, and why it failed if it did."""

    figures: dict[str, Any]
    races: bool
    error: str | None
    log: str

    @property
    def detection(self) -> str | None:
        """How the interpreter refused the synchronisation of the case, or None if it did not.

        "race", "deadlock", or one of the rules whose violation it raises as an error: "barrier",
        "union" and "unfinished". A case that fails for another reason is not refused.
        """
        if self.races:
            return "race"
        rules = (rule for rule, words in _RULES.items() if words.search(self.error or ""))
        return next(rules, None)


def params(*, detect_races: bool = True) -> plgpu.InterpretGPUParams:
    """What to pass a kernel as `interpret`; memory nobody wrote holds NaN."""
    # Unless told otherwise JAX 0.12 raises at a race, which may hang; 0.11 has no such option.
    known = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
    warn: dict[str, Any] = {"on_race": "warn"} if "on_race" in known else {}
    return plgpu.InterpretGPUParams(
        detect_races=detect_races,
        uninitialized_memory="nan",
        num_tma_threads_per_device=_ASYNCHRONOUS_PLACES,
        **warn,
    )


@contextlib.contextmanager
def abstract_gpu(chip: str = "sm_100") -> Iterator[None]:
    """Traces kernels as for that chip, without one."""
    device = AbstractDevice(device_kind=_PLATFORMS[chip], platform="gpu", num_cores=4)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def run_case(
    case: str, *, chip: str = "sm_100", timeout: float = 300.0, **arguments: object
) -> Outcome:
    """Outcome of `module:function` called with the arguments in a new process.

    The process sees the same modules as this one and ends after `timeout` seconds; that counts as
    an error, since a kernel that waits for an arrival that never comes hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", __name__, case, chip, json.dumps(arguments), str(report)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "NPROC": _THREADS,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with Path(folder, "log").open("w+") as log:
            try:
                process = subprocess.run(
                    command, env=environment, stdout=log, stderr=log, timeout=timeout, check=False
                )
                failure = f"the process ended with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                failure = f"{_TOO_LATE} {timeout} seconds"
            log.seek(0)
            text = log.read()
        found = {"figures": {}, "races": _RACE in text, "error": failure}
        if report.exists():
            found = json.loads(report.read_text())
        return Outcome(**found, log=text[-_KEPT_LOG:])


@contextlib.contextmanager
def _race_states() -> Iterator[list[Any]]:
    """The race states of all kernels that run inside; JAX keeps that of the last one only."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    make = gpu_callbacks.GPURaceDetectionState  # pyright: ignore[reportPrivateImportUsage]
    states = []

    def make_and_keep(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        states.append(make(*arguments, **options))
        return states[-1]

    with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", make_and_keep):
        yield states


def _run_here(case: str, chip: str, arguments: str, report: str) -> None:
    from pallas_kernels.proof import wgmma

    module, function = case.split(":")
    figures, races, error = {}, False, None
    with _race_states() as states:
        try:
            with abstract_gpu(chip), wgmma.modelled():
                run = getattr(importlib.import_module(module), function)
                figures = run(**json.loads(arguments))
        except Exception as exception:
            traceback.print_exc()
            races = _RACE in str(exception)
            error = f"{type(exception).__name__}: {str(exception)[-_KEPT_LOG:]}"
    races |= any(state.races_found for state in states)
    partial = Path(report).with_suffix(".partial")
    partial.write_text(json.dumps({"figures": figures, "races": bool(races), "error": error}))
    partial.rename(report)
    # Threads of the interpreter that still wait would keep the process alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _run_here(*sys.argv[1:])
