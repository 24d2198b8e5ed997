"""`ssd-jax doctor`: what this machine and this installation have, and what is broken."""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, Literal

from ssd_jax.cli.environment import cache_folder, unwritable_reason
from ssd_jax.json_text import to_json

WIDTH = 80
_CHOSEN, _SPARE = "chosen", "next choice"  # what the registry says of kernels that can run
_PACKAGES = (
    "ssd-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "orbax-checkpoint",
)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_doctor` reads."""
    parser.epilog = "Exit code 1 if there is a problem that keeps the program from working well."
    parser.add_argument(
        "--json",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="one JSON object with everything instead of text; sizes in bytes (default: no)",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="a line for every device and kernel instead of one screen (default: no)",
    )
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="the folder to look at, as for `generate` (default: in the user's cache folder)",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """1 if there is a problem, else 0, after the findings went to stdout."""
    findings = examine(args.compilation_cache)
    tell = describe if args.verbose else describe_briefly
    print(to_json(findings, indent=2) if args.json else tell(findings))
    return 1 if findings["problems"] else 0


def examine(cache_choice: str | None) -> dict[str, Any]:
    """All findings, of JSON types; `problems` lists in sentences what is broken."""
    problems: list[str] = []
    devices, kernels = _devices(problems)
    return {
        "versions": {"python": platform.python_version(), **dict(map(_version, _PACKAGES))},
        "cpu_count": os.cpu_count(),
        "devices": devices,
        "kernels": kernels,
        "compilation_cache": _cache(cache_choice, problems),
        "demo": {"target": _demo("target"), "draft": _demo("draft")},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SSD_JAX_")},
        "problems": problems,
    }


def describe(findings: dict[str, Any]) -> str:
    """The findings as lines for people, one for each device and kernel."""
    lines = _versions_and_cores(findings)
    lines += [_device_line([device]) for device in findings["devices"]]
    for kernel in findings["kernels"]:
        lines.append(f"kernel {kernel['op']}/{kernel['implementation']}: {kernel['status']}")
    return "\n".join(lines + _folders_and_problems(findings))


def describe_briefly(findings: dict[str, Any]) -> str:
    """The findings on one screen: devices and kernels of which the same is true share a line."""
    lines = _versions_and_cores(findings)
    for devices in _grouped(
        (tuple(device[key] for key in ("platform", "kind", "memory_total")), device)
        for device in findings["devices"]
    ).values():
        lines.append(_device_line(devices))
    kernels = _grouped(
        ((kernel["implementation"], kernel["status"]), kernel["op"])
        for kernel in findings["kernels"]
        if kernel["status"] != _SPARE
    )
    for (name, status), ops in kernels.items():
        if status == _CHOSEN:
            lines.append(f"kernel {name} runs {', '.join(ops)}")
    for (name, status), ops in kernels.items():
        if status != _CHOSEN:
            lines.append(f"kernel {name} ({len(ops)} ops): {status}")
    lines += _folders_and_problems(findings)
    lines.append("--verbose lists every device and kernel, --json is for programs")
    return "\n".join(
        textwrap.fill(
            line,
            WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )


def _versions_and_cores(findings: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in findings["versions"].items())
    return [versions, f"{findings['cpu_count']} CPU cores"]


def _device_line(devices: list[dict[str, Any]]) -> str:
    """One device, or several of a kind with what is free on the fullest of them."""
    from ssd_jax.memory import format_bytes

    one, ids = devices[0], ", ".join(str(device["id"]) for device in devices)
    free = format_bytes(min(device["memory_free"] for device in devices))
    several = len(devices) > 1
    return (
        f"device{'s' if several else ''} {ids}: {one['platform']}, {one['kind']}, {free} of "
        f"{format_bytes(one['memory_total'])} free{' or more on each' if several else ''}"
    )


def _folders_and_problems(findings: dict[str, Any]) -> list[str]:
    from ssd_jax.memory import format_bytes

    cache = findings["compilation_cache"]
    if cache["folder"] is None:
        lines = ["compilation cache: off"]
    else:
        size, state = format_bytes(cache["bytes"]), "" if cache["writable"] else ", not writable"
        lines = [f"compilation cache: {cache['folder']} ({size}{state})"]
    for role, folder in findings["demo"].items():
        lines.append(f"demo {role}: {folder or 'missing'}")
    lines += [f"{name}={value}" for name, value in findings["variables"].items()]
    return lines + (
        [f"problem: {problem}" for problem in findings["problems"]] or ["no problems found"]
    )


def _grouped[K: Hashable, V](pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """The values of each key, in the order in which they came."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package, None


def _devices(problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The devices, and what each kernel would do on the first of them."""
    import jax
    import psutil

    from pallas_kernels.registry import explain
    from ssd_jax.memory import available_bytes

    try:
        devices = jax.devices()
    except RuntimeError as error:
        problems.append(f"JAX finds no device: {error}")
        return [], []
    physical = psutil.virtual_memory().total
    account = [
        {
            "id": device.id,
            "platform": device.platform,
            "kind": device.device_kind,
            "memory_total": (device.memory_stats() or {}).get("bytes_limit", physical),
            "memory_free": available_bytes(device),
        }
        for device in devices
    ]
    kernels = [
        {"op": op, "implementation": name, "status": status}
        for op, name, status in explain(devices[0])
    ]
    return account, kernels


def _cache(choice: str | None, problems: list[str]) -> dict[str, Any]:
    folder = cache_folder(choice, os.environ)
    if folder is None:
        return {"folder": None, "bytes": 0, "writable": False}
    reason = unwritable_reason(folder)
    if reason is not None:
        problems.append(
            f"The compilation cache {folder} cannot be written ({reason}), so every start compiles "
            "anew: make it writable or name another with --compilation-cache."
        )
    return {"folder": str(folder), "bytes": _num_bytes(folder), "writable": reason is None}


def _num_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it may be gone by now
                total += (Path(parent) / name).lstat().st_size
    return total


def _demo(role: Literal["target", "draft"]) -> str | None:
    from ssd_jax.errors import CheckpointError
    from ssd_jax.model import demo_folder

    try:
        return str(demo_folder(role))
    except CheckpointError:
        return None
