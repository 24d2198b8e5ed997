"""The methods that are simulated, by the names that the benchmarks have for them."""

import dataclasses
from typing import get_args

from ssd_jax.engine.ssd_options import Fallback
from ssd_jax.errors import RequestError
from ssd_jax.fan_out import FanOut, uniform_fan_out

_OPTIONS = {"ar": set(), "draft": {"k"}, "ssd": {"k", "f", "miss", "fallback"}}
LONGEST_DRAFT = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedMethod:
    """A method; `draft_len` 0 is plain decoding, `fan_out` None speculation without SSD."""

    draft_len: int = 0
    fan_out: FanOut | None = None
    fallback: Fallback = "neural"

    def __post_init__(self) -> None:
        if not 0 <= self.draft_len <= LONGEST_DRAFT:
            raise RequestError(f"k must be from 0 to {LONGEST_DRAFT}, got {self.draft_len}.")
        if self.fan_out is None:
            return
        if self.draft_len == 0:
            raise RequestError("ssd must draft a token at least: give a k of 1 or more.")
        if len(self.fan_out.after_hit) != self.draft_len + 1:
            raise RequestError(
                f"A fan-out for k={self.draft_len} has {self.draft_len + 1} numbers (for 0 to "
                f"{self.draft_len} accepted tokens), got {len(self.fan_out.after_hit)}."
            )
        if self.fallback not in get_args(Fallback):
            raise RequestError(f"fallback must be neural or ngram, got {self.fallback!r}.")


def parse_simulated(name: str) -> SimulatedMethod:
    """The method of a name such as `ar`, `draft:k=4` or `ssd:k=3,f=4-3-2-3,fallback=ngram`.

    Raises:
        RequestError: a kind, an option or a value that is not known.
    """
    kind, _, tail = name.partition(":")
    if kind not in _OPTIONS:
        raise RequestError(f"A simulated method must be ar, draft or ssd, got {name!r}.")
    options: dict[str, str] = {}
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        if key not in _OPTIONS[kind]:
            allowed = ", ".join(sorted(_OPTIONS[kind])) or "none"
            raise RequestError(f"Options of {kind} are {allowed}, got {key!r} in {name!r}.")
        options[key] = value
    if kind == "ar":
        return SimulatedMethod()
    draft_len = _numbers(name, options.get("k", "4"))[0]
    if kind == "draft":
        if draft_len < 1:
            raise RequestError(f"k must be 1 or more, got {draft_len} in {name!r}.")
        return SimulatedMethod(draft_len=draft_len)
    after_hit = _fan_out(name, options.get("f", "3"), draft_len)
    after_miss = _fan_out(name, options["miss"], draft_len) if "miss" in options else after_hit
    fallback = options.get("fallback", "neural")
    if fallback not in get_args(Fallback):
        raise RequestError(f"fallback must be neural or ngram, got {fallback!r} in {name!r}.")
    return SimulatedMethod(
        draft_len=draft_len,
        fan_out=FanOut(after_hit=after_hit, after_miss=after_miss),
        fallback="ngram" if fallback == "ngram" else "neural",
    )


def _fan_out(name: str, text: str, draft_len: int) -> tuple[int, ...]:
    counts = _numbers(name, text)
    return counts if "-" in text else uniform_fan_out(draft_len, counts[0])


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("-"))
    except ValueError as error:
        raise RequestError(f"Expected whole numbers, got {text!r} in method {name!r}.") from error
