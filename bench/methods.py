"""Decoding methods by name, as the benchmarks' command lines give them.

A name is a kind with options: `ar`, `draft:k=4`, `draft:k=8,auto`, `ngram:kind=mod,n=6,max=32`,
`combined:k=4,auto`, `ssd:k=3,f=4-3-2-3`, `wide:k=16`. `auto` chooses draft lengths by round times
measured beforehand; `wide` drafts nothing and takes passes as wide as for k drafted tokens;
`accept=0.8` accepts drafted tokens by chance; `verify=rejection` is the other way to verify when
sampling; `f` and `miss` are the fan-outs of ssd after a hit and after a miss, `fallback=ngram` its
other fallback.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from ssd_jax import (
    SSD,
    FanOut,
    Model,
    NgramConfig,
    SamplingParams,
    Speculation,
    measure_round_times,
)
from ssd_jax.engine.speculation import RoundTimes
from ssd_jax.errors import RequestError

DEFAULT_METHODS = (
    "ar",
    "draft:k=1",
    "draft:k=2",
    "draft:k=4",
    "draft:k=4,auto",
    "ngram:kind=simple",
    "ngram:kind=map",
    "ngram:kind=mod",
    "ngram:kind=simple,auto",
    "combined:k=2",
    "combined:k=4,auto",
)
_NGRAM_OPTIONS = {"n": "n", "max": "max_draft", "min": "min_draft", "hits": "min_hits"}
_OPTIONS = {
    "ar": set(),
    "wide": {"k"},
    "draft": {"k", "auto", "accept", "verify"},
    "ngram": {"kind", *_NGRAM_OPTIONS, "auto", "accept", "verify"},
    "combined": {"k", "kind", *_NGRAM_OPTIONS, "auto", "accept", "verify"},
    "ssd": {"k", "f", "miss", "fallback", "accept", "verify"},
}
_DRAFT_LEN = {"draft": "k", "combined": "k", "ssd": "k", "ngram": "max"}  # of a grid
_FAN_OUT = {"ssd": "f"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchMethod:
    """A method under its name; `speculation` None is plain decoding.

    `auto` says that its draft lengths should follow round times, which are measured by `prepare`.
    """

    name: str
    speculation: Speculation | SSD | None
    auto: bool = False

    def prepare(self, target: Model, params: SamplingParams, batch_size: int) -> "BenchMethod":
        """The method with round times, if it asks for them."""
        if not isinstance(self.speculation, Speculation) or not self.auto:
            return self
        times = measure_round_times(target, self.speculation, params, batch_size=batch_size)
        return dataclasses.replace(
            self, speculation=dataclasses.replace(self.speculation, round_times=times)
        )

    @property
    def guesses(self) -> bool:
        """Whether its speed depends on how often drafted tokens are the target's own."""
        return (
            self.speculation is not None
            and bool(self.speculation.names)
            and self.speculation.synthetic_acceptance is None
        )

    @property
    def round_times(self) -> RoundTimes | None:
        """The measured times, if there are any."""
        return self.speculation.round_times if isinstance(self.speculation, Speculation) else None


def expand_grid(
    names: Sequence[str], draft_lens: Sequence[str], fan_outs: Sequence[str]
) -> tuple[str, ...]:
    """Every name with every draft length and fan-out that it does not state and has a use for.

    Plain decoding comes first, since the others are compared with it.
    """
    expanded = ["ar"]
    for name in names:
        kind, colon, tail = name.partition(":")
        stated = {part.partition("=")[0] for part in tail.split(",")}
        axes = []
        for option, values in ((_DRAFT_LEN.get(kind), draft_lens), (_FAN_OUT.get(kind), fan_outs)):
            if option is not None and option not in stated and values:
                axes.append([f"{option}={value}" for value in values])
        for options in itertools.product(*axes):
            parts = [*([tail] if colon else []), *options]
            expanded.append(":".join([kind, ",".join(parts)] if parts else [kind]))
    return tuple(dict.fromkeys(expanded))


def parse_method(name: str, draft: Model, ssd_draft: Model) -> BenchMethod:
    """The method of that name; `ssd_draft` is the draft model where ssd shall have it.

    Raises:
        RequestError: an unknown kind or option, or a value out of range.
    """
    kind, _, tail = name.partition(":")
    if kind not in _OPTIONS:
        raise RequestError(f"A method must be one of {', '.join(_OPTIONS)}, got {name!r}.")
    options: dict[str, str] = {}
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        if key not in _OPTIONS[kind]:
            allowed = ", ".join(sorted(_OPTIONS[kind])) or "none"
            raise RequestError(f"Options of {kind} are {allowed}, got {key!r} in {name!r}.")
        if key == "auto" and value:
            raise RequestError(f"auto takes no value, got {value!r} in {name!r}.")
        options[key] = value
    if kind == "ar":
        return BenchMethod(name=name, speculation=None)
    if kind == "ssd":
        return BenchMethod(name=name, speculation=_parse_ssd(name, options, ssd_draft))
    settings: dict[str, Any] = {"exact": kind == "wide"}
    if kind in ("draft", "combined"):
        settings["draft"] = draft
    if kind in ("ngram", "combined"):
        numbers = {
            field: _number(name, options[key], int)
            for key, field in _NGRAM_OPTIONS.items()
            if key in options
        }
        kinds: Any = options.get("kind", "simple")
        settings["ngram"] = NgramConfig(kind=kinds, **numbers)
    if "k" in options:
        settings["draft_len"] = _number(name, options["k"], int)
    settings |= _verification(name, options)
    speculation = Speculation(**settings)
    return BenchMethod(name=name, speculation=speculation, auto="auto" in options)


def _parse_ssd(name: str, options: dict[str, str], draft: Model) -> SSD:
    settings: dict[str, Any] = {}
    if "k" in options:
        settings["draft_len"] = _number(name, options["k"], int)
    if "miss" in options and "f" not in options:
        raise RequestError(f"miss needs the fan-out after a hit as well, got {name!r}: add f.")
    if "f" in options:
        counts = tuple(_number(name, part, int) for part in options["f"].split("-"))
        settings["fan_out"] = counts if "-" in options["f"] else int(options["f"])
        if "miss" in options:
            after_miss = tuple(_number(name, part, int) for part in options["miss"].split("-"))
            settings["fan_out"] = FanOut(after_hit=counts, after_miss=after_miss)
    if "fallback" in options:
        settings["fallback"] = options["fallback"]
    return SSD(draft=draft, **settings, **_verification(name, options))


def _verification(name: str, options: dict[str, str]) -> dict[str, Any]:
    """What a name says on judging drafts."""
    settings: dict[str, Any] = {}
    if "verify" in options:
        settings["verification"] = options["verify"]
    if "accept" in options:
        settings["synthetic_acceptance"] = _number(name, options["accept"], float)
    return settings


def _number[T: (int, float)](name: str, value: str, kind: type[T]) -> T:
    try:
        return kind(value)
    except ValueError as error:
        raise RequestError(f"Expected a number, got {value!r} in method {name!r}.") from error
