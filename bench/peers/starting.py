"""Who is there: the peers' processes, and making the environments that they lack."""

import argparse
import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path

from bench.peers.client import Peer, PeerError, module_command
from bench.peers.contenders import SERVER
from bench.peers.environments import NAMES, Places, make, missing, places
from bench.peers.protocol import Load


def make_missing(args: argparse.Namespace, names: Collection[str]) -> dict[str, str]:
    """Make the environments that peers of these names lack; why that failed, by peer."""
    failed: dict[str, str] = {}
    for name in NAMES:
        if name in names and missing(name, _places(args)):
            try:
                make(name, args.environments)
            except PeerError as error:
                failed[name] = str(error)
    return failed


def start(name: str, args: argparse.Namespace, load: Load, work: Path) -> tuple[Peer, Load]:
    """A peer's process, and its own way to be told of the models.

    Raises:
        PeerError: it is not there, and why.
    """
    where = _places(args)
    if name in NAMES and (reason := missing(name, where)):
        raise PeerError(f"{reason}.")
    log = work / f"{name}.log"
    match name:
        case "transformers":
            return Peer(name, module_command(where.transformers, "transformers_peer"), log), load
        case "llama.cpp":
            from bench.peers.weights import gguf_file

            files = {"target": load.target, "draft": load.draft}
            made = {
                role: str(gguf_file(Path(folder), work / f"{role}.gguf", load.dtype, where.gguf))
                for role, folder in files.items()
                if folder is not None
            }
            command = module_command(None, "llama_cpp_peer", str(where.llama_server))
            return Peer(name, command, log), dataclasses.replace(load, **made)
        case _ if name == SERVER:
            if args.server is None:
                raise PeerError("no address: give one with --server.")
            address = dataclasses.replace(load, target=args.server)
            return Peer(name, module_command(None, "openai_peer"), log), address
        case _:
            return Peer(name, module_command(None, "ours_peer"), log), load


def _places(args: argparse.Namespace) -> Places:
    """Where programs are, those that the command line names first."""
    made = places(args.environments)
    return Places(
        transformers=args.transformers_python or made.transformers,
        gguf=args.gguf_python or made.gguf,
        llama_server=args.llama_server or made.llama_server,
    )


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
