"""Making the environments that peers need, and finding those that are there.

    python -m bench.peers.environments transformers llama.cpp [--into DIR] [--jobs 2]

`transformers` is a Python 3.11 with torch (`--pip-option` adds options of pip, such as an index of
CPU wheels); `llama.cpp` is the source package of llama-cpp-python, built for this processor, and a
Python with `gguf`. Needs `uv`; llama.cpp also a C++ compiler, and minutes.
"""

import argparse
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
# Native instructions, one program without shared libraries, and nothing it does not need.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
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


def make(name: str, folder: Path, pip_options: Sequence[str] = (), jobs: int = 2) -> None:
    """Make one peer's environment in the folder.

    Raises:
        PeerError: a step failed, with the end of what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = places(folder)
    if name == "transformers":
        _environment(where.transformers, "3.11", TRANSFORMERS_PACKAGES, pip_options)
    elif name == "llama.cpp":
        _environment(where.gguf, "3.12", EXPORT_PACKAGES, pip_options)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            _build_llama_cpp(Path(scratch), where.llama_server, pip_options, jobs)
    else:
        raise PeerError(f"Environments can be made of {', '.join(NAMES)}; got {name!r}.")


def _environment(
    python: Path, version: str, packages: Sequence[str], pip_options: Sequence[str]
) -> None:
    """A virtual environment with pip and these packages."""
    uv = shutil.which("uv")
    if uv is None:
        raise PeerError("Making an environment needs uv, which is not there: pip install uv.")
    root = str(python.parents[1])
    _step([uv, "venv", "--quiet", "--no-project", "--seed", "--clear", "--python", version, root])
    _step([str(python), "-m", "pip", "install", "--quiet", *pip_options, *packages])


def _build_llama_cpp(scratch: Path, server: Path, pip_options: Sequence[str], jobs: int) -> None:
    """Fetch the sources, build the server alone, and move it to its place."""
    python = scratch / "tools" / "bin" / "python"
    _environment(python, "3.12", BUILD_PACKAGES, pip_options)
    # pip reads a source package's metadata by its build tools, which are in this environment.
    fetch = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    fetch += [
        "--no-binary",
        "llama-cpp-python",
        "--dest",
        str(scratch),
        *pip_options,
        LLAMA_CPP_SOURCE,
    ]
    tools = {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    _step(fetch, tools)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(scratch, filter="data")
    (tree,) = scratch.glob("*/vendor/llama.cpp")
    build = scratch / "build"
    cmake = str(python.parent / "cmake")
    _step([cmake, "-G", "Ninja", "-S", str(tree), "-B", str(build), *CMAKE_OPTIONS], tools)
    target = ["--target", "llama-server", "--parallel", str(jobs)]
    _step([cmake, "--build", str(build), *target], tools)
    shutil.move(build / "bin" / "llama-server", server)


def _step(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run a command, shown on stderr; PeerError if it fails."""
    print("+", *command, file=sys.stderr)
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise PeerError(f"{command[0]} cannot be run ({error.strerror}): install it.") from error
    if done.returncode:
        said = " / ".join(done.stdout.strip().splitlines()[-LAST_LINES:])
        raise PeerError(f"`{' '.join(command)}` failed with code {done.returncode}: {said}")


def main() -> int:
    """Make what the command line names; the exit code."""
    parser = argparse.ArgumentParser(description="Make the environments of peers.")
    parser.add_argument("names", nargs="+", choices=NAMES)
    parser.add_argument("--into", type=Path, default=default_folder(), help="folder (user's cache)")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (2)")
    parser.add_argument("--pip-option", action="append", default=[], help="passed to pip")
    args = parser.parse_args()
    try:
        for name in args.names:
            make(name, args.into, args.pip_option, args.jobs)
    except (PeerError, OSError) as error:
        print(f"environments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
