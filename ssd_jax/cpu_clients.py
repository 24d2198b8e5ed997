"""Two groups of CPU cores as two devices that do not disturb each other.

Devices of one CPU client share a pool of threads, so that a wide matrix product on one takes the
other's cores. Two clients whose threads are pinned to cores of their own do not. There is no public
way to make a second client: this is the one place that reaches into JAX for it.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import xla_bridge

from ssd_jax.errors import ConfigError

_NAME = "cpu_draft"  # the number of its cores and of the target's follow


def can_split_cpu() -> bool:
    """Whether `split_cpu` would work and JAX would not rather run on an accelerator."""
    if not hasattr(os, "sched_setaffinity") or xla_bridge.backends_are_initialized():
        return False
    wanted = jax.config.jax_platforms or ("cpu" if not _has_accelerator_plugin() else "")
    return wanted.split(",")[0] == "cpu" and len(os.sched_getaffinity(0)) > 1


def draft_cpu() -> jax.Device | None:
    """The device that `split_cpu` made for the draft, None if it was not called."""
    names = [name for name in xla_bridge.backends() if name.startswith(_NAME)]
    return jax.devices(names[0])[0] if names else None


def computes_on_one_thread() -> bool:
    """Whether every CPU device of this process has a single thread to compute with."""
    for name in xla_bridge.backends():
        if name.startswith(_NAME):
            return name.endswith("_1_1")
    threads = os.environ.get("NPROC") or (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        threads = min(int(threads), len(os.sched_getaffinity(0)))
    return int(threads) == 1


def _has_accelerator_plugin() -> bool:
    return bool(importlib.metadata.entry_points(group="jax_plugins"))


def split_cpu(num_draft_cores: int = 1) -> tuple[jax.Device, jax.Device]:
    """A device on the process's first cores (the default device) and one on the last ones.

    Must be called before anything of JAX has run, on Linux. The calling thread, which dispatches
    to both, stays on the draft's cores from then on: on the target's it would wait whenever the
    target computes (rounds of SSD took 1.4 times as long).

    Raises:
        ConfigError: too few cores, another system, or JAX is running already.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("Splitting a CPU needs Linux: put target and draft on one device.")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= num_draft_cores < len(cores):
        raise ConfigError(
            f"Splitting the CPU needs a core for each side, got {len(cores)} cores of which "
            f"{num_draft_cores} for the draft."
        )
    if xla_bridge.backends_are_initialized():
        raise ConfigError("Splitting the CPU must come before JAX runs anything: call it first.")
    target_cores, draft_cores = cores[:-num_draft_cores], cores[-num_draft_cores:]
    name = f"{_NAME}_{len(draft_cores)}_{len(target_cores)}"

    def make_draft_client() -> Any:  # noqa: ANN401 (JAX's type is private)
        with _only_cores(draft_cores):
            return xla_bridge.make_cpu_client()

    if jax.config.jax_platforms:  # where some are named, JAX makes clients of no others
        jax.config.update("jax_platforms", f"{jax.config.jax_platforms},{name}")
    xla_bridge.register_backend_factory(name, make_draft_client, priority=-100, fail_quietly=False)
    with _only_cores(target_cores):  # JAX makes all clients at the first use of any
        devices = jax.devices("cpu")[0], jax.devices(name)[0]
    os.sched_setaffinity(0, draft_cores)
    return devices


@contextlib.contextmanager
def _only_cores(cores: Sequence[int]) -> Iterator[None]:
    """Threads that are made meanwhile run on these cores, and pools get one thread for each."""
    before, threads = os.sched_getaffinity(0), os.environ.get("NPROC")
    os.sched_setaffinity(0, cores)
    os.environ["NPROC"] = str(len(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if threads is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = threads
