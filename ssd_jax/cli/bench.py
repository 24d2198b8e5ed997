"""`ssd-jax bench`: the repository's benchmarks, which the installed package does not contain."""

import argparse
import importlib
import importlib.util

from ssd_jax.errors import RequestError

_TOOLS = {  # module of the repository whose `main` runs it, and what it is
    "run": ("bench.run", "every decoding method on the same prompts: one JSON record"),
    "report": ("bench.report", "tables and plots of records"),
    "micro": ("bench.micro", "what the parts of a round cost"),
    "guard": ("bench.guard", "whether the ratios that matter are still what they were"),
    "peers": ("bench.peers.__main__", "other engines on the same weights and prompts"),
    "simulate": ("bench.simulate.__main__", "rounds on hardware that is not at hand"),
}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `run_bench` reads."""
    tools = "; ".join(f"{name}: {text}" for name, (_, text) in _TOOLS.items())
    parser.add_argument("tool", choices=tuple(_TOOLS), metavar="TOOL", help=tools)
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="of the tool, see `ssd-jax bench TOOL --help`",
    )


def run_bench(args: argparse.Namespace) -> int:
    """Run one of the benchmarks; its exit code.

    Raises:
        RequestError: the benchmarks are not there.
        SsdJaxError: whatever the benchmark refuses.
    """
    module, _ = _TOOLS[args.tool]
    if not _is_there(module):
        raise RequestError(
            f"`ssd-jax bench {args.tool}` needs the module {module}, which is in the repository "
            f"and not in the installed package: run `uv run ssd-jax bench {args.tool}` in a clone."
        )
    try:
        return importlib.import_module(module).main(args.options)
    except SystemExit as done:  # --help prints and leaves
        return int(done.code or 0)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package
        return False
