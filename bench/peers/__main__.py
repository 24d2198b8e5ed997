"""ssd-jax and other engines on the same weights and prompts, one JSON record.

    ssd-jax bench peers --prompts HumanEval.jsonl.gz --peers transformers llama.cpp --out FILE
    ssd-jax bench peers --random-model --peers transformers llama.cpp --dtype bfloat16
    ssd-jax bench peers --prompts FILE --peers server --server http://localhost:8000/v1

All run on the same cores with as many threads, in the same precision, and give as many tokens,
greedily; prompts go as token ids. They take turns on each prompt, and outputs are compared with
those of our plain decoding. A peer whose environment is not there is named and skipped; `python -m
bench.peers.environments` makes them. For the names of contenders see `contenders.py`; each tells
tokens per second after the first tokens ("decode") apart from the time until these ("first").
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.peers.client import Peer, PeerError, module_command
from bench.peers.contenders import MODES, OURS, SERVER, choose_contenders
from bench.peers.environments import NAMES, Places, default_folder, make, missing, places
from bench.peers.protocol import Load
from ssd_jax.errors import RequestError, SsdJaxError

SCHEMA = 1  # of the record; raised when a field changes its meaning
RANDOM_PROMPT_TOKENS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what the command line asks for; the exit code."""
    args = parse_arguments(arguments)
    try:
        from bench.record import write_record

        cores = use_cores(args.threads)
        with tempfile.TemporaryDirectory(prefix="ssd-jax-peers-") as work:
            write_record(run(args, cores, Path(work)), args.out)
    except SsdJaxError as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    peers = [peer for peer in MODES if peer != OURS]
    parser = argparse.ArgumentParser(
        prog="ssd-jax bench peers", description="Our speed against other engines' in one run."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="JSON Lines with a `prompt` field")
    source.add_argument(
        "--random-model",
        action="store_true",
        help="a random Llama of 60 M weights and random prompts; plain decoding only",
    )
    parser.add_argument("--peers", nargs="+", choices=peers, default=["transformers", "llama.cpp"])
    parser.add_argument(
        "--contenders", nargs="+", default=[], metavar="PEER/MODE", help="instead of every mode"
    )
    parser.add_argument("--model", type=Path, help="target's folder (the demo target)")
    parser.add_argument("--draft-model", type=Path, help="draft's folder (the demo draft)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="processor cores (1)")
    parser.add_argument("--num-prompts", type=int, default=8, help="how many to use (8)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens an answer (128)")
    parser.add_argument("--rounds", type=int, default=3, help="times each answer is timed (3)")
    parser.add_argument("--out", type=Path, help="file for the record (stdout)")
    parser.add_argument("--server", help="address of an OpenAI-compatible server, up to /v1")
    parser.add_argument(
        "--environments", type=Path, default=default_folder(), help="folder of the peers' programs"
    )
    parser.add_argument("--make", action="store_true", help="first make what is missing there")
    parser.add_argument("--transformers-python", type=Path, help="instead of one made there")
    parser.add_argument("--gguf-python", type=Path, help="instead of one made there")
    parser.add_argument("--llama-server", type=Path, help="instead of one made there")
    return parser.parse_args(arguments)


def use_cores(threads: int) -> list[int]:
    """Keep this process and those it starts on so many cores.

    Raises:
        RequestError: there are not so many.
    """
    available = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    if not 1 <= threads <= len(available):
        raise RequestError(f"--threads must be 1 to {len(available)} here, got {threads}.")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, available[:threads])
    for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    return available[:threads]


def run(args: argparse.Namespace, cores: list[int], work: Path) -> dict[str, object]:
    """The record of one comparison."""
    # After the cores are chosen: JAX looks at them when it is imported.
    import numpy as np

    from bench.peers.compare import measure, summarise
    from bench.peers.weights import RANDOM_60M, Pair, hf_folder, random_folder
    from bench.record import environment
    from ssd_jax.checkpointing.load import read_config
    from ssd_jax.model import demo_folder
    from ssd_jax.text import load_tokenizer
    from ssd_jax.text.prompt_file import read_prompts

    for option in ("num_prompts", "max_tokens", "rounds"):
        if getattr(args, option) < 1:
            flag = "--" + option.replace("_", "-")
            raise RequestError(f"{flag} must be at least 1, got {getattr(args, option)}.")
    contenders = choose_contenders(args.peers, args.contenders, plain_only=args.random_model)
    if args.random_model:
        pair = Pair(target=random_folder(RANDOM_60M, work), draft=None)
        random = np.random.default_rng(0)
        shape = (args.num_prompts, RANDOM_PROMPT_TOKENS)
        prompts = random.integers(RANDOM_60M.vocab_size, size=shape).tolist()
        tokenizer, config = None, RANDOM_60M
    else:
        pair = Pair(
            target=hf_folder(args.model or demo_folder("target"), work),
            draft=hf_folder(args.draft_model or demo_folder("draft"), work),
        )
        tokenizer, config = load_tokenizer(pair.target), read_config(pair.target)
        texts = read_prompts(args.prompts)
        encoded = [tokenizer.encode(prompt) for prompt in texts]
        fitting = [ids for ids in encoded if len(ids) + args.max_tokens <= config.max_context]
        prompts = fitting[: args.num_prompts]
    if not prompts:
        raise RequestError(
            f"No prompt of {args.prompts} fits {config.max_context} tokens with {args.max_tokens} "
            "for the answer: lower --max-tokens or choose other prompts."
        )
    context = max(map(len, prompts)) + args.max_tokens + 64  # drafts reach beyond the end
    load = Load(
        target=str(pair.target),
        draft=None if pair.draft is None else str(pair.draft),
        dtype=args.dtype,
        threads=len(cores),
        context=context,
    )
    versions: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for name in dict.fromkeys(one.peer for one in contenders):
            try:
                peer, own_load = start(name, args, load, work)
                peers[name] = stack.enter_context(peer)
                versions[name] = dataclasses.asdict(peer.load(own_load))["versions"]
            except PeerError as error:
                if name == OURS:
                    raise
                peers.pop(name, None)
                skipped[name] = str(error)
                say(f"{name} is skipped: {error}")
        present = [one for one in contenders if one.peer in peers]
        results = measure(peers, present, prompts, args.max_tokens, args.rounds, say)
    decode_text = None if tokenizer is None else tokenizer.decode
    return {
        "schema": SCHEMA,
        "kind": "peers",
        "environment": environment(),
        "threads": len(cores),
        "dtype": args.dtype,
        "target_parameters": config.num_params,
        "prompts": {
            "source": "random ids" if args.random_model else args.prompts.name,
            "number": len(prompts),
            "mean_tokens": sum(map(len, prompts)) / len(prompts),
        },
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "versions": versions,
        "skipped": skipped,
        **summarise(results, decode_text),
    }


def start(name: str, args: argparse.Namespace, load: Load, work: Path) -> tuple[Peer, Load]:
    """A peer's process, and its own way to be told of the models.

    Raises:
        PeerError: it is not there, and why.
    """
    where = _places(args)
    if name in NAMES and (reason := missing(name, where)):
        if not args.make:
            raise PeerError(f"{reason}.")
        make(name, args.environments)
        where = _places(args)
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


if __name__ == "__main__":
    sys.exit(main())
