"""Compile a kernel for a GPU that is not there, down to machine code, and report what it uses.

The CUDA plugin's compile-only client runs on any CPU. It needs an environment of its own (about
4 GB), built in two commands at the root of the repository; SSD_JAX_AOT_PYTHON names its Python, or
several, separated as in PATH, of which tests use each and all else the first:

    uv venv --python 3.12 .venv-aot
    uv pip install -p .venv-aot "jax[cuda13]==0.11.2" nvidia-cuda-nvdisasm jaxtyping tokamax==0.0.17
    SSD_JAX_AOT_PYTHON=.venv-aot/bin/python python -m pytest tests/kernels/test_ahead_of_time.py

(tokamax only for the comparison with its kernels.)

A case is a function "package.module:function" that takes keyword options and returns a function
with the shapes of its arguments. Compiling happens in a process of its own, because the switches
that make the compiler write its findings are read when jax is imported.

What assembles the PTX decides about registers and spills. JAX 0.11 runs the first ptxas that it
finds, and here that is the one of its own environment, as on a GPU where nothing else is installed.
JAX 0.12 calls the library nvJitLink, which makes relocatable code: it ignores register budgets
(C7504), and the kernels spill.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.proof import sass
from pallas_kernels.proof.targets import TARGETS, Target
from pallas_kernels.register_budgets import WARPGROUP_THREADS

INSTALL = (
    'uv venv --python 3.12 .venv-aot && uv pip install -p .venv-aot "jax[cuda13]==0.11.2" '
    "nvidia-cuda-nvdisasm jaxtyping, then set SSD_JAX_AOT_PYTHON=.venv-aot/bin/python"
)
HOT = ("MUFU.EX2", "UTCHMMA", "HGMMA", "HMMA", "LDTM")

type Case = Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """What one kernel of a program became: resources and instructions."""

    name: str
    assembler: str  # what made the machine code, and the version of PTX it was given
    warpgroups: int  # of a block
    registers: int  # at launch, per thread
    registers_asked: int  # with `setmaxnreg`, per thread, summed over the warpgroups
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    tensor_columns: int
    register_budgets_ignored: bool  # ptxas C7504
    products_serialized: bool  # ptxas C7510 and its kin: wgmma waits where it need not
    counts: sass.Counts
    hot_loops: tuple[sass.Counts, ...]  # innermost loops with products, exponentials, TMEM loads
    vote_branches: tuple[sass.Counts, ...]  # what only some warps of a warpgroup may run


class AheadOfTimeError(RuntimeError):
    """Compilation failed or its environment is missing; the message says what to do."""


def interpreters() -> tuple[str, ...]:
    """The Pythons that compile: those of SSD_JAX_AOT_PYTHON, or else the one that runs this."""
    named = os.environ.get("SSD_JAX_AOT_PYTHON") or sys.executable
    return tuple(path for path in named.split(os.pathsep) if path)


def missing(python: str | None = None) -> str | None:
    """What a compiling environment lacks and how to build it, or None if it is complete.

    `python` is the first of `interpreters()` unless named.
    """
    python = python or interpreters()[0]
    probe = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        "lacks = [n for n in ('jax-cuda13-plugin', 'nvidia-cuda-nvcc', 'nvidia-cuda-nvdisasm')\n"
        "         if not any(d.metadata['Name'] == n for d in m.distributions(name=n))]\n"
        "m.version('jax')\n"
        "sys.stdout.write(', '.join(lacks))"
    )
    found = subprocess.run(
        [python, "-c", probe], capture_output=True, text=True, timeout=60, check=False
    )
    if found.returncode:
        return f"{python} has no jax: {INSTALL}"
    return f"{python} lacks {found.stdout}: {INSTALL}" if found.stdout else None


def compile_case(
    case: str,
    target: Target,
    *,
    python: str | None = None,
    timeout: float = 300,
    **options: object,
) -> tuple[CompiledKernel, ...]:
    """The Mosaic GPU kernels of a case compiled for a target, in a process of its own.

    Args:
        case: "package.module:function"; the function takes `options` and returns a function and the
            shapes of its arguments.
        target: the GPU to compile for.
        python: what compiles, the first of `interpreters()` unless named.
        timeout: seconds after which the compiling process is stopped.
        options: passed to the case; what JSON can carry.

    Raises:
        AheadOfTimeError: the process failed; the message ends with what it wrote last.
    """
    command = [python or interpreters()[0], "-m", "pallas_kernels.proof.ahead_of_time"]
    command += [target.name, case, json.dumps(options)]
    with tempfile.TemporaryDirectory(prefix="ahead-of-time-") as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": dump,
            "PYTHONPATH": os.pathsep.join(_source_paths()),
        }
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment,
        )
        if done.returncode:
            raise AheadOfTimeError(
                f"compiling {case} for {target.device_name} failed: {done.stderr[-4000:]}"
            )
        return _read(pathlib.Path(dump), done.stdout + done.stderr)


def _source_paths() -> list[str]:
    """This repository and what of it is on the path, without the packages of this environment."""
    root = pathlib.Path(__file__).parents[2]
    own = [pathlib.Path(path).resolve() for path in sys.path if path]
    own = [path for path in own if root in path.parents and "site-packages" not in path.parts]
    return [str(root), *(str(path) for path in own)]


def _read(dump: pathlib.Path, said: str) -> tuple[CompiledKernel, ...]:
    """The kernels that a compilation wrote into a folder."""
    return tuple(
        _read_kernel(path, said) for path in sorted(dump.glob("*.sass_ctrl"), key=_written)
    )


def _written(path: pathlib.Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _read_kernel(path: pathlib.Path, said: str) -> CompiledKernel:
    disassembly = path.read_text()
    assembler = path.with_suffix(".ptxas").read_text()
    resources = _resources(path).read_text()
    ptx = path.with_suffix(".ptx").read_text()
    said = said + assembler
    warpgroups = _number(r"\.maxntid (\d+)", ptx) // WARPGROUP_THREADS
    registers = _number(r"Used (\d+) registers", assembler)
    return CompiledKernel(
        name=path.stem,
        assembler=_assembler(assembler, ptx),
        warpgroups=warpgroups,
        registers=registers,
        registers_asked=sass.registers_asked(disassembly, warpgroups, registers),
        spill_store_bytes=_number(r"(\d+) bytes spill stores", assembler),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", assembler),
        shared_bytes=_number(r"smem_scratch_bytes=(\d+)", resources),
        tensor_columns=_number(r"tmem_scratch_cols=(\d+)", resources)
        + _number(r"tmem_collective_scratch_cols=(\d+)", resources),
        register_budgets_ignored="C7504" in said,
        products_serialized=bool(re.search(r"C75(08|10|11|12|13|14)|are serialized", said)),
        counts=sass.count(sass.parse(disassembly)[0]),
        hot_loops=tuple(sass.hot_loops(disassembly, HOT)),
        vote_branches=tuple(sass.vote_branches(disassembly)),
    )


def _resources(path: pathlib.Path) -> pathlib.Path:
    """What JAX says a kernel uses; JAX 0.12 may number that otherwise than the machine code."""
    same = path.with_suffix(".resources.txt")
    name = re.sub(r"_\d+$", "", path.stem)
    found = [same] if same.exists() else list(path.parent.glob(f"{name}_*.resources.txt"))
    if len(found) != 1:
        raise AheadOfTimeError(f"{path.name} should have one report of resources, found {found}.")
    return found[0]


def _assembler(report: str, ptx: str) -> str:
    """What wrote a report: the program ptxas, or the library nvJitLink, which adds lines to it."""
    library = re.search(r"^info +:|application ptx input", report, re.MULTILINE)
    version = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    if version is None:
        raise AheadOfTimeError(f"the PTX should name its version, it begins with {ptx[:200]!r}.")
    return f"{'nvJitLink' if library else 'ptxas'}, PTX {version[1]}"


def _number(pattern: str, text: str) -> int:
    """The largest number that a pattern finds; a kernel's helper functions report theirs too."""
    found = re.findall(pattern, text)
    if not found:
        raise AheadOfTimeError(f"the compiler's report has no {pattern!r}: {text[:500]}")
    return max(int(number) for number in found)


def _prefer_own_assembler() -> None:
    """Let this environment's ptxas be the first on the PATH, before one of the machine."""
    packages = importlib.util.find_spec("nvidia")
    folders = list(packages.submodule_search_locations or ()) if packages else []
    own = [path for folder in folders for path in pathlib.Path(folder).glob("*/bin")]
    os.environ["PATH"] = os.pathsep.join([*map(str, own), os.environ.get("PATH", "")])


def _compile(target: Target, case: str, options: Mapping[str, Any]) -> None:
    """Lower and compile a case for a target in this process."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    _prefer_own_assembler()
    module, _, name = case.partition(":")
    build: Case = getattr(importlib.import_module(module), name)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.description(), topology="1x1x1"
    )
    everywhere = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    function, shapes = build(**options)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes
    )
    jax.jit(function).lower(*placed).compile()


def main(arguments: list[str] | None = None) -> None:
    """Compile one case: target, case, options as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("case", help="package.module:function")
    parser.add_argument("options", help="keyword options of the case, as JSON")
    given = parser.parse_args(arguments)
    _compile(TARGETS[given.target], given.case, json.loads(given.options))


if __name__ == "__main__":
    main()
