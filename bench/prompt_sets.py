r"""Workloads by name: evaluation sets by path, small bundled sets, and texts made here.

A workload is named `NAME` or `NAME=PATH`:

    code tasks math chat                          bundled: a dozen prompts each, in bench/prompts
    copy-heavy stdlib-continue nothing-repeats    made from the standard library
    random                                        random tokens, for synthetic acceptance alone
    humaneval=PATH mbpp=PATH svamp=PATH gsm8k=PATH chat=PATH own=PATH

Files are read as `ssd_jax.text.prompt_file` reads them. MBPP's and the bundled tasks become a
docstring to be followed by code, SVAMP's, GSM8K's and the bundled sums "Question: ...\nAnswer:",
chat prompts a conversation in the model's own template; `own` is taken as it is.
"""

import hashlib
from pathlib import Path
from typing import get_args

import numpy as np

from bench.workloads import Style, Workload, WorkloadName, own_workload
from ssd_jax.errors import RequestError
from ssd_jax.model import Model
from ssd_jax.text.prompt_file import read_prompts

BUNDLED: dict[str, Style] = {
    "code": "plain",
    "tasks": "docstring",
    "math": "question",
    "chat": "chat",
}
FROM_FILE: dict[str, Style] = {
    "humaneval": "plain",
    "mbpp": "docstring",
    "svamp": "question",
    "gsm8k": "question",
    "chat": "chat",
    "own": "plain",
}
RANDOM = "random"
NUM_RANDOM, RANDOM_LEN = 64, 64
_FOLDER = Path(__file__).parent / "prompts"


def open_workload(name: str) -> Workload:
    """The workload that a command line names.

    Raises:
        RequestError: an unknown name, a set whose file is not given, or a file that cannot be read.
    """
    kind, equals, path = name.partition("=")
    if equals:
        if kind not in FROM_FILE:
            raise RequestError(
                f"Only {', '.join(FROM_FILE)} are read from a file, got {name!r}: write own=PATH "
                "for prompts of your own."
            )
        label = Path(path).name.partition(".")[0] if kind == "own" else kind
        prompts = read_prompts(Path(path))
        return Workload(name=label, prompts=prompts, style=FROM_FILE[kind], source=Path(path).name)
    if kind in BUNDLED:
        prompts = read_prompts(_FOLDER / f"{kind}.jsonl")
        return Workload(name=kind, prompts=prompts, style=BUNDLED[kind], source="bundled")
    if kind == RANDOM:
        seeds = tuple(str(seed) for seed in range(NUM_RANDOM))
        return Workload(name=kind, prompts=seeds, style="random", source="random")
    if kind in get_args(WorkloadName):
        return own_workload(kind)
    if kind in FROM_FILE:
        raise RequestError(
            f"{kind} is read from its own file, got none: write {kind}=PATH, or use a bundled "
            f"workload ({', '.join(BUNDLED)})."
        )
    known = (*BUNDLED, *get_args(WorkloadName), RANDOM, *(f"{name}=PATH" for name in FROM_FILE))
    raise RequestError(f"A workload must be one of {', '.join(known)}, got {name!r}.")


def encode_prompt(model: Model, workload: Workload, prompt: str) -> tuple[int, ...]:
    """One of the workload's prompts as the model's ids.

    Raises:
        RequestError: the model has no tokenizer, or no chat template where one is needed.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise RequestError("The target must have a tokenizer, got a folder without: add it.")
    match workload.style:
        case "plain":
            return tuple(tokenizer.encode(prompt))
        case "docstring":
            return tuple(tokenizer.encode(f'"""\n{prompt}\n"""\n'))
        case "question":
            return tuple(tokenizer.encode(f"Question: {prompt}\nAnswer:"))
        case "chat":
            return tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}]))
        case "random":
            special = tokenizer.special_ids()
            ids = set(tokenizer.vocabulary().values()) - special
            plain = sorted(token_id for token_id in ids if token_id < model.config.vocab_size)
            return tuple(np.random.default_rng(int(prompt)).choice(plain, RANDOM_LEN).tolist())


def fingerprint(workload: Workload) -> str:
    """A hash of the prompts and of how they are asked, to notice that a file has changed."""
    text = "\0".join((workload.style, *workload.prompts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
