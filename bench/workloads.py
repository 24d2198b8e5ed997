"""Prompts to measure decoding with, and how much of an answer is copied from its prompt."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Literal, get_args

from ssd_jax.errors import RequestError

WorkloadName = Literal["stdlib-continue", "copy-heavy", "nothing-repeats"]
Style = Literal["plain", "docstring", "question", "chat", "random"]

COPIES = 4  # of a function in a copy-heavy prompt
COPY_HEAVY_SHARE = 0.7  # of an answer that has to repeat its prompt
COPIED_RUN = 8  # tokens in a row that must occur in the prompt to count as copied
_MODULES = (
    "bisect",
    "calendar",
    "colorsys",
    "copy",
    "csv",
    "difflib",
    "fnmatch",
    "fractions",
    "functools",
    "glob",
    "heapq",
    "json.decoder",
    "json.encoder",
    "keyword",
    "linecache",
    "opcode",
    "operator",
    "os",
    "posixpath",
    "pprint",
    "random",
    "shlex",
    "shutil",
    "stat",
    "statistics",
    "string",
    "tempfile",
    "textwrap",
    "tokenize",
    "traceback",
    "types",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts and how they are to be answered.

    Attributes:
        name: of the workload.
        prompts: candidates, in the order in which they are to be used.
        style: what is put around a prompt (see `prompt_sets.encode_prompt`); a "random" one is the
            seed of random tokens.
        source: where the prompts come from: a file's name, or in words.
        temperature: for the answers; 0 is greedy.
        min_repeated: share of an answer that must be copied from the prompt for it to be used.
    """

    name: str
    prompts: tuple[str, ...]
    style: Style = "plain"
    source: str = "standard library"
    temperature: float = 0.0
    min_repeated: float = 0.0


def own_workload(name: str) -> Workload:
    """One of the workloads that are made from the standard library of the running Python.

    "stdlib-continue" gives the first half of a function. "copy-heavy" is a renaming job: a short
    function several times under numbered names, then the header of the next one. "nothing-repeats"
    goes on from a line of prose at a temperature so high that nearly nothing occurs twice.

    Raises:
        RequestError: there is no workload of that name.
    """
    match name:
        case "stdlib-continue":
            prompts = [source[: len(source) // 2] for _, source in library_functions(400, 1600)]
            return Workload(name=name, prompts=tuple(prompts))
        case "copy-heavy":
            prompts = [renaming_prompt(*pair, COPIES) for pair in library_functions(60, 350)]
            return Workload(name=name, prompts=tuple(prompts), min_repeated=COPY_HEAVY_SHARE)
        case "nothing-repeats":
            modules = [importlib.import_module(module) for module in _MODULES]
            lines = [(module.__doc__ or "").strip().partition("\n")[0] for module in modules]
            prompts = [line for line in lines if line]
            return Workload(name=name, prompts=tuple(prompts), temperature=1.5)
    raise RequestError(
        f"The workload must be one of {', '.join(get_args(WorkloadName))}, got {name!r}."
    )


def library_functions(min_chars: int, max_chars: int) -> list[tuple[str, str]]:
    """Name and source of the standard library's functions of such a length, always in one order.

    Neighbours come of different modules, so that the first few are a fair sample.
    """
    found = []
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        functions = [
            (name, value)
            for name, value in sorted(vars(module).items())
            if inspect.isfunction(value) and value.__module__ == module_name
        ]
        for rank, (name, function) in enumerate(functions):
            try:
                source = inspect.getsource(function)
            except OSError:
                continue  # generated at import, such as the methods of named tuples
            if source.startswith(f"def {name}(") and min_chars <= len(source) <= max_chars:
                found.append((rank, module_name, name, source))
    return [(name, source) for _, _, name, source in sorted(found)]


def renaming_prompt(name: str, source: str, copies: int) -> str:
    """A function under the names name_0, name_1, ..., and the header of the next in line."""

    def renamed(index: int) -> str:
        return re.sub(rf"\b{re.escape(name)}\b", f"{name}_{index}", source)

    header = renamed(copies).partition("\n")[0]
    return "\n\n".join([*(renamed(index) for index in range(copies)), header + "\n"])


def repeated_share(prompt: Sequence[int], answer: Sequence[int], run: int = COPIED_RUN) -> float:
    """Share of the answer's tokens that lie in runs of `run` tokens which the prompt holds too.

    A run may begin in the prompt's last tokens and go on in the answer.
    """
    if not answer:
        return 0.0
    known = {tuple(prompt[start : start + run]) for start in range(len(prompt) - run + 1)}
    context = min(run - 1, len(prompt))
    text = [*prompt[len(prompt) - context :], *answer]
    copied: set[int] = set()
    for start in range(len(text) - run + 1):
        if tuple(text[start : start + run]) in known:
            copied.update(range(start, start + run))
    return sum(position >= context for position in copied) / len(answer)
