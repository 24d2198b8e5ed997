"""What the harness and a peer's process say to each other: one JSON object a line, in turns.

The harness sends `{"op": "load", ...}` once and `{"op": "run", ...}` per request; the peer answers
each with an object, or with `{"error": "a sentence"}`. The end of its input ends the peer. Prints
of the engine go to stderr, so that they cannot get in between.

Runs with the standard library of Python 3.11 alone, as every peer's environment has it.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal


class PeerFailure(Exception):
    """What a peer cannot do, in a sentence that goes to the harness."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The models a peer shall run, and how.

    Attributes:
        target: folder or file of the target's weights, or address of a server that has them.
        draft: the same of the draft, None for none.
        dtype: precision of the weights.
        threads: processor cores to use.
        context: tokens of the longest prompt and its answer together.
    """

    target: str
    draft: str | None
    dtype: Literal["float32", "bfloat16", "q8_0"]
    threads: int
    context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a peer is once it is ready: its versions, for the record."""

    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A greedy answer of exactly `max_tokens` tokens, by a mode such as "draft" with options."""

    mode: str
    options: dict[str, str]
    prompt: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a `Run`; seconds.

    Attributes:
        tokens: the answer, None if the engine gives text only.
        text: the answer as text, where the engine gives it.
        first_s: until the first tokens were there, None if the engine does not tell.
        decode_s: after that.
        decode_tokens: how many tokens came in `decode_s`; the first ones belong to `first_s`.
        drafted: tokens that were proposed, None if the engine does not tell or drafts nothing.
        accepted: how many of those stood.
    """

    tokens: list[int] | None
    text: str | None = None
    first_s: float | None
    decode_s: float
    decode_tokens: int
    drafted: int | None = None
    accepted: int | None = None


def serve(load: Callable[[Load], Loaded], run: Callable[[Run], Answer]) -> None:
    """Answer requests from stdin until it ends; `load` is called before `run`."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        json.dump(_reply(json.loads(line), load, run), replies)
        replies.write("\n")
        replies.flush()


def _reply(
    request: dict[str, Any], load: Callable[[Load], Loaded], run: Callable[[Run], Answer]
) -> dict[str, Any]:
    """The answer to one request; whatever fails becomes a sentence."""
    operation = request.pop("op")
    try:
        if operation == "load":
            return dataclasses.asdict(load(Load(**request)))
        return dataclasses.asdict(run(Run(**request)))
    except PeerFailure as error:
        return {"error": str(error)}
    except Exception as error:  # an engine may raise anything; the harness shall hear of it
        return {"error": f"{type(error).__name__}: {error}"}


def number(options: dict[str, str], name: str, default: int) -> int:
    """A whole number among a mode's options."""
    value = options.get(name)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError:
        raise PeerFailure(f"Option {name} must be a whole number, got {value!r}.") from None


def only_options(mode: str, options: dict[str, str], allowed: tuple[str, ...]) -> None:
    """Refuse options that the mode would ignore."""
    for name in options:
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise PeerFailure(f"Options of mode {mode} are {known}, got {name!r}.")
