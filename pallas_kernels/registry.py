"""Which implementations an op has, and why each of them can or cannot run.

An implementation lives in a module whose `KERNELS` says what it implements. It states in words why
it does not run: first for a device (cheap, and what `ssd-jax doctor` shows), then for a call.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer

XLA = "xla"
# The JAX that assembles Mosaic GPU kernels as they are written. From 0.12 on it does so with
# nvJitLink, wherever that library is, which ignores `setmaxnreg` (C7504); no option changes it.
MOSAIC_JAX = "0.11"


class UnsupportedError(NotImplementedError):
    """A named implementation cannot run this call; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One op as one module computes it.

    `unsupported` takes what `run` takes, shapes in place of arrays, and returns why `run` cannot
    compute that, or None.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]


def supports_everything(*arrays: Any, **options: Any) -> str | None:  # noqa: ANN401
    """None: no call is beyond this kernel."""
    del arrays, options
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What a device must tell for a choice; `capability` is (major, minor), CUDA devices only."""

    platform: str
    kind: str
    capability: tuple[int, int] | None


# GPUs by a word of their name, for which kernels may be compiled where none is.
_CAPABILITIES = {
    ("B200", "GB200"): (10, 0),
    ("H100", "H200", "H800", "GH200"): (9, 0),
    ("L4", "L40", "L40S"): (8, 9),
    ("A10", "A10G", "A40", "A6000"): (8, 6),
    ("A100", "A800"): (8, 0),
}
CPU = Chip(platform="cpu", kind="cpu", capability=None)


def chip_of(device: jax.Device | jax.sharding.AbstractDevice) -> Chip:
    """The chip that a device is; an abstract one has only a name to tell by."""
    parts = str(getattr(device, "compute_capability", "")).split(".")
    known = len(parts) == 2 and all(part.isdecimal() for part in parts)
    capability = (int(parts[0]), int(parts[1])) if known else None
    if capability is None and device.platform == "gpu":
        capability = _capability_by_name(device.device_kind)
    return Chip(platform=device.platform, kind=device.device_kind, capability=capability)


def _capability_by_name(kind: str) -> tuple[int, int] | None:
    """The capability of a GPU of that name, if it is known here."""
    words = set(re.split(r"[^A-Z0-9]+", kind.upper()))
    found = (capability for names, capability in _CAPABILITIES.items() if words & set(names))
    return next(found, None)


def device_of(arrays: Any) -> jax.Device | None:  # noqa: ANN401
    """A device that these arrays are on, or None if one of them is being traced."""
    leaves = jax.tree.leaves(arrays)
    if not leaves or any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    devices = (
        device for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()
    )
    return min(devices, key=lambda device: device.id, default=None)


def target_chip() -> Chip:
    """The chip that a program which is being traced is probably for.

    That of the mesh in use if it names one, else jax_default_device, else the first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return chip_of(device)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, str):
        return chip_of(jax.devices(default)[0])
    return chip_of(jax.devices()[0] if default is None else default)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One way to compute an op: its module is imported once a device and a call fit.

    `platform` is the one it is for, None any; `capabilities` are the CUDA devices it is for, none
    of them means that every device will do. `needs` is a package it imports besides jax, and
    `needs_jax` the only version of JAX ("0.11") that compiles it well for a device; None: all do.
    """

    name: str
    module: str
    platform: str | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    needs: str | None = None
    needs_jax: str | None = None

    def unsupported_chip(self, chip: Chip) -> str | None:
        """Why it cannot run on this chip, or None."""
        if self.platform not in (None, chip.platform):
            return f"is for {self.platform}s, and this device is {_describe(chip)}"
        if self.capabilities and chip.capability not in self.capabilities:
            wanted = " or ".join(f"sm_{major}{minor}" for major, minor in self.capabilities)
            return f"needs a GPU of {wanted}, and this device is {_describe(chip)}"
        if self.needs_jax is not None and not jax.__version__.startswith(f"{self.needs_jax}."):
            return (
                f"needs JAX {self.needs_jax}, and this is JAX {jax.__version__}: from 0.12 on it "
                "assembles with nvJitLink, which ignores register budgets, so that kernels spill; "
                'pip install "jax[cuda13]==0.11.2"'
            )
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"needs the package {self.needs}, which is not installed"
        return None

    def kernel(self, op: str) -> Kernel:
        """What the module says about the op."""
        return importlib.import_module(self.module).KERNELS[op]

    def unsupported_call(
        self, op: str, chip: Chip, arrays: tuple[Any, ...], options: Mapping[str, Any]
    ) -> str | None:
        """Why it cannot compute this call on this chip, or None."""
        return self.unsupported_chip(chip) or self.kernel(op).unsupported(*arrays, **options)


def choose(
    implementations: tuple[Implementation, ...],
    op: str,
    chip: Chip,
    arrays: tuple[Any, ...],
    options: Mapping[str, Any],
    named: str | None,
) -> Implementation:
    """The named implementation, or the first that can compute the call.

    Raises:
        UnsupportedError: The named one cannot.
        ValueError: No implementation has that name.
    """
    if named is None:
        return next(
            one
            for one in implementations
            if one.unsupported_call(op, chip, arrays, options) is None
        )
    for one in implementations:
        if one.name == named:
            reason = one.unsupported_call(op, chip, arrays, options)
            if reason is not None:
                raise UnsupportedError(
                    f"The implementation {named!r} of {op} cannot run: it {reason}; "
                    "name another, or none to get the first that can."
                )
            return one
    names = ", ".join(one.name for one in implementations)
    raise ValueError(f"{op} has no implementation {named!r}: name one of {names}, or none.")


def _describe(chip: Chip) -> str:
    if chip.capability is None:
        return chip.kind
    return f"{chip.kind} (sm_{chip.capability[0]}{chip.capability[1]})"


_XLA = (Implementation(name=XLA, module="pallas_kernels.reference"),)
_PROMPT_BLOCKS = Implementation(name="xla_blocks", module="pallas_kernels.attention_blocks")


def _mosaic(module: str, capability: tuple[int, int]) -> Implementation:
    """A module of Mosaic GPU kernels for one chip."""
    major, minor = capability
    return Implementation(
        name=f"mosaic_sm{major}{minor}",
        module=f"pallas_kernels.{module}",
        capabilities=(capability,),
        needs_jax=MOSAIC_JAX,
    )


# Each lists only chips that it was compiled for in tests.
_ATTENTION = (
    _mosaic("forward_sm100", (10, 0)),
    _mosaic("forward_sm90", (9, 0)),
    _PROMPT_BLOCKS,
    *_XLA,
)
_ATTENTION_BACKWARD = (
    _mosaic("backward_sm100", (10, 0)),
    _PROMPT_BLOCKS,
    *_XLA,
)
_DECODE = (
    _mosaic("decode_sm100", (10, 0)),
    _mosaic("decode_sm90", (9, 0)),
    Implementation(
        name="triton",
        module="pallas_kernels.decode_triton",
        capabilities=((8, 0), (8, 6), (8, 9), (12, 0)),
        needs="jax_triton",
    ),
    Implementation(name="xla_blocks", module="pallas_kernels.decode_blocks", platform="cpu"),
    *_XLA,
)

IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "attention": _ATTENTION,
    "attention_backward": _ATTENTION_BACKWARD,
    "decode_attention": _DECODE,
    "verify_attention": _DECODE,
    "ancestor_attention": _DECODE,
    "tree_attention": _DECODE,
}


def explain(device: jax.Device) -> list[tuple[str, str, str]]:
    """For each op its implementations on this device, in the order in which they are tried.

    Each is (op, name, status). The status is "chosen" for the first that runs here, "next choice"
    for what takes the calls that the ones before it do not support, or else why it cannot run.
    """
    chip, rows = chip_of(device), []
    for op, implementations in IMPLEMENTATIONS.items():
        status = "chosen"
        for one in implementations:
            reason = one.unsupported_chip(chip)
            rows.append((op, one.name, status if reason is None else reason))
            status = "next choice" if reason is None else status
    return rows
