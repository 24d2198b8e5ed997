"""Making the environments that peers need, and finding those that are there.

    python -m bench.peers.environments transformers llama.cpp [--into DIR] [--jobs 2]

`transformers` is a Python 3.11 with torch (`--pip-option` adds options of pip, such as an index of
CPU wheels); `llama.cpp` is the source package of llama-cpp-python, built for this processor, and a
Python with `gguf`. Needs `uv`; llama.cpp also a C++ compiler, and minutes.
"""

import argparse
import collections
import dataclasses
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.peers.client import LAST_LINES, PeerError

TRANSFORMERS_PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "safetensors>=0.6,<0.9")
EXPORT_PACKAGES = ("gguf==0.19.0", "safetensors>=0.6,<0.9", "ml_dtypes>=0.5,<0.7")
BUILD_PACKAGES = ("scikit-build-core>=0.10,<2", "cmake>=3.28,<5", "ninja>=1.11,<2")
LLAMA_CPP_SOURCE = "llama-cpp-python==0.3.36"
# Native instructions, one program without shared libraries, nothing it does not need, and no
# warnings (compilers' own headers give thousands).
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS=-w",
    "-DCMAKE_CXX_FLAGS=-w",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
# The server is linked with a library for images and sound, which text never runs: it is compiled
# without optimisation, all else as the sources have it.
UNUSED_CMAKE = "cmake_language(DEFER CALL target_compile_options mtmd PRIVATE -O0)\n"
NAMES = ("transformers", "llama.cpp")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the peers' programs are; they need not exist.

    Attributes:
        transformers: Python with torch and transformers.
        gguf: Python with gguf, safetensors and ml_dtypes.
        llama_server: llama.cpp's server.
    """

    transformers: Path
    gguf: Path
    llama_server: Path


def places(folder: Path) -> Places:
    """Where `make` puts things in a folder."""
    return Places(
        transformers=folder / "transformers" / "bin" / "python",
        gguf=folder / "gguf" / "bin" / "python",
        llama_server=folder / "llama-server",
    )


def default_folder() -> Path:
    """The user's cache folder for peers."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "ssd-jax" / "peers"


def missing(name: str, where: Places) -> str | None:
    """Why a peer cannot run, in words, None if it can."""
    needed = {
        "transformers": (where.transformers,),
        "llama.cpp": (where.llama_server, where.gguf),
    }[name]
    for path in needed:
        if not os.access(path, os.X_OK):
            return (
                f"no program at {path}: make it with `python -m bench.peers.environments {name}`, "
                "or say where one is"
            )
    return None


def make(name: str, folder: Path, pip_options: Sequence[str] = (), jobs: int = 0) -> None:
    """Make one peer's environment in the folder, where each part appears once it is whole.

    `jobs` is how many compilers run at once, 0 as many as there are cores.

    Raises:
        PeerError: a tool is absent or a step failed, with the end of what it printed.
    """
    if name not in NAMES:
        raise PeerError(f"Environments can be made of {', '.join(NAMES)}; got {name!r}.")
    where = places(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
            if name == "transformers":
                packages = TRANSFORMERS_PACKAGES
                _environment(where.transformers, "3.11", packages, pip_options, Path(scratch))
            else:
                _find_compiler()
                _environment(where.gguf, "3.12", EXPORT_PACKAGES, pip_options, Path(scratch))
                _build_llama_cpp(Path(scratch), where.llama_server, pip_options, jobs)
    except OSError as error:
        raise PeerError(f"Making {name} in {folder} failed: {error}.") from error


def _environment(
    python: Path,
    version: str,
    packages: Sequence[str],
    pip_options: Sequence[str],
    scratch: Path,
) -> None:
    """A virtual environment with pip and these packages, whose Python is `python`."""
    uv = shutil.which("uv")
    if uv is None:
        raise PeerError("Making an environment needs uv, which is not there: pip install uv.")
    root = python.parents[1]
    made = scratch / root.name
    venv = [uv, "venv", "--quiet", "--no-project", "--seed", "--python", version, str(made)]
    _step(f"making an environment of Python {version}", venv, fetches=True)
    pip = [str(made / "bin" / "python"), "-m", "pip", "install", "--quiet", *pip_options, *packages]
    _step(f"installing {', '.join(packages)} with pip", pip, fetches=True)
    if made != root:
        shutil.rmtree(root, ignore_errors=True)
        made.rename(root)


def _find_compiler() -> None:
    """Refuse to begin what would fail in minutes."""
    named = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, named)):
        raise PeerError(
            f"Building llama.cpp needs a C++ compiler, but there is no {' or '.join(named)}: "
            "install one, or name a program with --llama-server."
        )


def _build_llama_cpp(scratch: Path, server: Path, pip_options: Sequence[str], jobs: int) -> None:
    """Fetch the sources, build the server alone, and move it to its place."""
    python = scratch / "tools" / "bin" / "python"
    _environment(python, "3.12", BUILD_PACKAGES, pip_options, scratch)
    # pip reads a source package's metadata by its build tools, which are in this environment.
    package, _, _ = LLAMA_CPP_SOURCE.partition("==")
    fetch = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    fetch += ["--no-binary", package, "--dest", str(scratch), *pip_options, LLAMA_CPP_SOURCE]
    tools = {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    _step(f"fetching the sources of {LLAMA_CPP_SOURCE} with pip", fetch, tools, fetches=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(scratch, filter="data")
    (tree,) = scratch.glob("*/vendor/llama.cpp")
    (scratch / "unused.cmake").write_text(UNUSED_CMAKE, encoding="utf-8")
    build, cmake = scratch / "build", str(python.parent / "cmake")
    configure = [cmake, "-G", "Ninja", "-S", str(tree), "-B", str(build), *CMAKE_OPTIONS]
    configure.append(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={scratch / 'unused.cmake'}")
    _step("configuring llama.cpp with cmake", configure, tools)
    compilers = str(jobs or num_cores())
    compile_all = [cmake, "--build", str(build), "--target", "llama-server", "--parallel"]
    _step("building llama-server", [*compile_all, compilers], tools)
    shutil.move(build / "bin" / "llama-server", server)


def num_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _step(
    what: str,
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    *,
    fetches: bool = False,
) -> None:
    """Run a command; it and what it prints are shown on stderr. PeerError if it fails.

    `fetches` says that it may need a network.
    """
    print("+", *command, file=sys.stderr, flush=True)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise PeerError(
            f"{command[0]}, needed for {what}, cannot be run ({error.strerror}): install it."
        ) from error
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    with process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            if line.strip():
                last.append(line.strip())
    if process.returncode:
        said = " / ".join(last) or "it printed nothing"
        hint = " (is there a network, or an index that pip knows?)" if fetches else ""
        raise PeerError(f"{what} failed with code {process.returncode}{hint}: {said}")


def main() -> int:
    """Make what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description="Make the environments of peers.")
    parser.add_argument("names", nargs="+", choices=NAMES)
    parser.add_argument("--into", type=Path, default=default_folder(), help="folder (user's cache)")
    parser.add_argument("--jobs", type=int, default=0, help="compilers at once (as many as cores)")
    parser.add_argument("--pip-option", action="append", default=[], help="passed to pip")
    args = parser.parse_args()
    try:
        for name in args.names:
            make(name, args.into, args.pip_option, args.jobs)
    except PeerError as error:
        print(f"environments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
