"""ssd-jax and other engines on the same weights and prompts, one JSON record.

    ssd-jax bench peers --prompts HumanEval.jsonl.gz --peers transformers llama.cpp --out FILE
    ssd-jax bench peers --random-model --peers transformers llama.cpp --dtype bfloat16
    ssd-jax bench peers --prompts FILE --peers server --server http://localhost:8000/v1

All run on the same cores with as many threads, in the same precision, and give as many tokens,
greedily; prompts go as token ids. They take turns on each prompt, and outputs are compared with
those of our plain decoding. A peer whose environment is not there is named and skipped; --make or
`python -m bench.peers.environments` makes them. For the names of contenders see `contenders.py`;
each tells tokens per second after the first tokens ("decode") apart from the time until these
("first"). A record with --out is written after every prompt; the same command goes on where it
stopped. `ssd-jax bench report` makes a table of it.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.client import Peer, PeerError
from bench.peers.contenders import MODES, OURS, Contender, choose_contenders
from bench.peers.environments import default_folder
from bench.peers.protocol import Load
from bench.peers.starting import make_missing, say, start
from ssd_jax.errors import RequestError, SsdJaxError
from ssd_jax.text.prompt_file import read_prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what the command line asks for; the exit code."""
    args = parse_arguments(arguments)
    try:
        contenders = choose_contenders(args.peers, args.contenders, plain_only=args.random_model)
        texts = () if args.random_model else read_prompts(args.prompts)
        for option in ("num_prompts", "max_tokens", "rounds"):
            if getattr(args, option) < 1:
                flag = "--" + option.replace("_", "-")
                raise RequestError(f"{flag} must be at least 1, got {getattr(args, option)}.")
        # On all cores, while there are all.
        unmade = make_missing(args, {one.peer for one in contenders}) if args.make else {}
        cores = use_cores(args.threads)
        with tempfile.TemporaryDirectory(prefix="ssd-jax-peers-") as work:
            run(args, contenders, texts, unmade, len(cores), Path(work))
    except SsdJaxError as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.out is not None and args.out.exists():
            print(f"\nInterrupted: the same command goes on with {args.out}.", file=sys.stderr)
        raise
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


def run(
    args: argparse.Namespace,
    contenders: Sequence[Contender],
    texts: Sequence[str],
    unmade: Mapping[str, str],
    threads: int,
    work: Path,
) -> None:
    """Compare, and write the record after every prompt.

    `unmade` are peers whose environments could not be made, and why.
    """
    # After the cores are chosen: JAX looks at them when it is imported.
    from bench.peers.compare import measure
    from bench.peers.inputs import open_inputs
    from bench.peers.resuming import Plan, add_results, fingerprint, open_record, read_results
    from bench.record import save_progress, write_record

    inputs = open_inputs(args, texts, work)
    prompts = inputs.prompts
    plan = Plan(
        model="random" if args.random_model else str(args.model or "demo"),
        draft_model=None if args.random_model else str(args.draft_model or "demo"),
        contenders=tuple(one.name for one in contenders),
        prompts="random ids" if args.random_model else args.prompts.name,
        prompts_sha256=fingerprint(prompts),
        num_prompts=len(prompts),
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        dtype=args.dtype,
        threads=threads,
        server=args.server,
    )
    record = open_record(plan, args.out)
    if record["complete"]:
        say(f"{args.out} holds the whole run already.")
        return
    record["target_parameters"] = inputs.num_params
    if args.out is not None:
        write_record(record, args.out)  # what cannot be written is noticed now
    load = Load(
        target=str(inputs.target),
        draft=None if inputs.draft is None else str(inputs.draft),
        dtype=args.dtype,
        threads=threads,
        context=max(map(len, prompts)) + args.max_tokens + 64,  # drafts reach beyond the end
    )
    with contextlib.ExitStack() as stack:
        known = read_results(record, contenders)
        names = dict.fromkeys(one.peer for one in known.turns)
        peers = _start_all(names, args, unmade, load, work, record, stack)
        turns = {one: done for one, done in known.turns.items() if one.peer in peers}
        known = dataclasses.replace(known, turns=turns)
        for results in measure(peers, known, prompts, args.max_tokens, args.rounds, say):
            add_results(record, results, prompts, inputs.decode_text)
            save_progress(record, args.out)
    if args.out is None:
        write_record(record, None)


def _start_all(
    names: Iterable[str],
    args: argparse.Namespace,
    unmade: Mapping[str, str],
    load: Load,
    work: Path,
    record: dict[str, Any],
    stack: contextlib.ExitStack,
) -> dict[str, Peer]:
    """The peers that are there, with their models loaded; the record names the others.

    Raises:
        PeerError: ours does not start.
        RequestError: the record holds answers of one that does not start, or of another version.
    """
    from bench.peers.resuming import refuse_other_versions

    peers: dict[str, Peer] = {}
    versions: dict[str, dict[str, str]] = {}
    for name in names:
        try:
            if name in unmade:
                raise PeerError(unmade[name])
            peer, own_load = start(name, args, load, work)
            stack.enter_context(peer)
            versions[name] = peer.load(own_load).versions
            peers[name] = peer
        except PeerError as error:
            if name == OURS:
                raise
            if record["units"]:
                raise RequestError(
                    f"{args.out} holds answers of {name}, which cannot go on: {error} Mend that, "
                    "or give --out another file."
                ) from error
            record["skipped"][name] = str(error)
            say(f"{name} is skipped: {error}")
    refuse_other_versions(record, versions, args.out)
    record["versions"].update(versions)
    return peers


if __name__ == "__main__":
    sys.exit(main())
