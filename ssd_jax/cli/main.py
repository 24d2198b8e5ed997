"""The `ssd-jax` command: which subcommands there are, and how each of them can end.

Exit codes: 0 done; 1 `doctor` found something broken; 2 a request that cannot be served or
understood, said in one sentence; 130 interrupted; 141 the reader of the output went away. JAX is
imported by the subcommand that runs, so that `--help` does not wait for it.
"""

import contextlib
import errno
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence

from ssd_jax.cli.parser import Flag, Parser, bind_variables, fill_in
from ssd_jax.errors import SsdJaxError

_COMMANDS = {
    "generate": "text that continues a prompt",
    "chat": "a conversation with a model that has a chat template",
    "tune": "options of speculative speculative decoding, chosen by measuring on this machine",
    "bench": "methods, parts and peers measured, from a clone of the repository",
    "convert": "a Hugging Face checkpoint into the project's own format",
    "inspect": "what a checkpoint folder holds",
    "doctor": "devices, versions, memory, caches and kernels of this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command line (without the program's name; None for the process's own)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer refuses it in words
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        print(end="", flush=True)
    except SsdJaxError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if error.errno == errno.EPIPE:
            return 141
        _tell("The output's disk is full; free some space.")
        return 2
    return code


def _tell(sentence: str) -> None:
    """Say what went wrong on stderr, if somebody listens there."""
    with contextlib.suppress(OSError):
        print(f"ssd-jax: error: {sentence}", file=sys.stderr, flush=True)


def _run(argv: list[str]) -> int:
    command = argv[0] if argv and argv[0] in _COMMANDS else None
    parser, flags = _build_parser(command)
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # --help and --version print and leave
        return int(done.code or 0)
    args = fill_in(args, flags, os.environ)
    run = getattr(importlib.import_module(f"ssd_jax.cli.{command}"), f"run_{command}")
    return run(args) or 0


def _build_parser(command: str | None) -> tuple[Parser, tuple[Flag, ...]]:
    """The parser, and the flags of the one subcommand whose arguments are declared."""
    parser = Parser(
        prog="ssd-jax",
        description="Exact LLM decoding at the speed limit, in JAX.",
        epilog="Each flag is also an environment variable, named in the subcommand's --help; the "
        "command line wins. The variable of a repeatable flag takes a JSON list of several values.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    flags: tuple[Flag, ...] = ()
    for name, text in _COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        if name == command:
            module = importlib.import_module(f"ssd_jax.cli.{name}")
            getattr(module, f"add_{name}_arguments")(subparser)
            flags = bind_variables(subparser)
    return parser, flags


def _version() -> str:
    try:
        return importlib.metadata.version("ssd-jax")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return "(not installed)"
