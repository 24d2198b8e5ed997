"""`ssd-jax doctor`: what this machine and this installation have, and what is broken."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

from ssd_jax.cli.environment import cache_folder, unwritable_reason
from ssd_jax.json_text import to_json

_PACKAGES = (
    "ssd-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tokenizers",
    "safetensors",
    "orbax-checkpoint",
)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_doctor` reads."""
    parser.epilog = "Exit code 1 if there is a problem that keeps the program from working well."
    parser.add_argument(
        "--json",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="one JSON object instead of text; sizes in bytes (default: no)",
    )
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="the folder to look at, as for `generate` (default: in the user's cache folder)",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """1 if there is a problem, else 0, after the findings went to stdout."""
    findings = examine(args.compilation_cache)
    print(to_json(findings, indent=2) if args.json else describe(findings))
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
    """The findings as lines for people."""
    from ssd_jax.memory import format_bytes

    lines = [", ".join(f"{name} {version}" for name, version in findings["versions"].items())]
    lines.append(f"{findings['cpu_count']} CPU cores")
    for device in findings["devices"]:
        free, total = (format_bytes(device[key]) for key in ("memory_free", "memory_total"))
        lines.append(
            f"device {device['id']}: {device['platform']}, {device['kind']}, {free} of {total} free"
        )
    for kernel in findings["kernels"]:
        lines.append(f"kernel {kernel['op']}/{kernel['implementation']}: {kernel['status']}")
    cache = findings["compilation_cache"]
    if cache["folder"] is None:
        lines.append("compilation cache: off")
    else:
        size, state = format_bytes(cache["bytes"]), "" if cache["writable"] else ", not writable"
        lines.append(f"compilation cache: {cache['folder']} ({size}{state})")
    for role, folder in findings["demo"].items():
        lines.append(f"demo {role}: {folder or 'missing'}")
    lines += [f"{name}={value}" for name, value in findings["variables"].items()]
    lines += [f"problem: {problem}" for problem in findings["problems"]] or ["no problems found"]
    return "\n".join(lines)


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
    return sum(
        (Path(parent) / name).stat().st_size
        for parent, _, names in os.walk(folder)
        for name in names
    )


def _demo(role: Literal["target", "draft"]) -> str | None:
    from ssd_jax.errors import CheckpointError
    from ssd_jax.model import demo_folder

    try:
        return str(demo_folder(role))
    except CheckpointError:
        return None
