"""What machine this is, and what it chooses to run."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Callable

import jax

from bench.record import environment
from pallas_kernels.registry import explain

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "flax",
    "torch",
    "triton",
    "jax-triton",
    "tokamax",
)


def describe(*, tell: Callable[..., None], dry_run: bool) -> None:
    """Device, driver, packages, and the implementation that each op takes."""
    del dry_run
    device = jax.devices()[0]
    found = environment()
    tell("device", f"{device.device_kind}, {found['cpus']} CPUs", environment=found)
    tell("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
        said = subprocess.run(
            [smi, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        tell("nvidia-smi", said.stdout.strip() or said.stderr.strip())
    chosen = [f"{op}: {name}" for op, name, status in explain(device) if status == "chosen"]
    tell("chosen kernels", ", ".join(chosen))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
