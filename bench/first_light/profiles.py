"""Which kernels the device ran, and for how long: the parts of an op's time."""

import collections
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kernel: its name, how often it ran, and its microseconds in all."""

    name: str
    count: int
    microseconds: float


def kernels_of(run: Callable[[], Any]) -> list[KernelTime]:
    """The kernels that a call runs on a GPU, the longest first; empty where there is no GPU."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        counts: collections.Counter[str] = collections.Counter()
        total: collections.Counter[str] = collections.Counter()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if "/device:GPU" not in plane.name:
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        counts[event.name] += 1
                        total[event.name] += event.duration_ns / 1e3  # pyright: ignore[reportArgumentType]
    return [
        KernelTime(name=name, count=counts[name], microseconds=float(spent))
        for name, spent in total.most_common()
    ]


def describe(kernels: list[KernelTime], calls: int) -> str:
    """The parts in words, for one of so many calls."""
    return "; ".join(
        f"{one.name[:48]} {one.count / calls:.2g}x {one.microseconds / calls:.1f} us"
        for one in kernels[:24]
    )
