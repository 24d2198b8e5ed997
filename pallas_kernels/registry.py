"""Which implementations an op has, and why each of them can or cannot run.

An implementation states in words why it does not support a device.
"""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to compute an op; `unsupported` says why it cannot run on a device, or None."""

    name: str
    unsupported: Callable[[jax.Device], str | None]


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "cached_attention": (Implementation(name="xla", unsupported=lambda device: None),),
    "tree_attention": (Implementation(name="xla", unsupported=lambda device: None),),
}


def explain(device: jax.Device) -> list[tuple[str, str, str]]:
    """For each op its implementations on this device: (op, name, "runs" or the reason why not)."""
    return [
        (op, implementation.name, implementation.unsupported(device) or "runs")
        for op, implementations in IMPLEMENTATIONS.items()
        for implementation in implementations
    ]
