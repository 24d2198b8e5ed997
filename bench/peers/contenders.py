"""Who takes part: a peer with a mode and its options, by names such as `llama.cpp/draft:k=4`."""

import dataclasses

from ssd_jax.errors import RequestError

OURS, SERVER = "ours", "server"
# What each can be asked for; its own defaults and settings that suit small models on a CPU, since
# what counts is the best of each.
MODES = {
    OURS: ("ar", "draft:k=2", "draft:k=3", "draft:k=4", "ngram:kind=simple", "combined:k=3"),
    "transformers": ("plain", "draft", "draft:k=3", "draft:k=5", "lookup", "lookup:k=4"),
    "llama.cpp": (
        "plain",
        "draft:k=2",
        "draft:k=3",
        "draft:k=4",
        "draft:k=8",
        "ngram-simple",
        "ngram-simple:n=3,max=11",
        "ngram-map-k:n=3,max=11",
        "ngram-mod",
        "combined:k=3,n=3,max=11",
        "ngram-cache",
    ),
    SERVER: ("plain",),
}
_PLAIN = ("ar", "plain")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A peer's mode with its options; an option without a value is the empty text."""

    peer: str
    mode: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """As `parse_contender` reads it."""
        options = ",".join(f"{key}={value}" if value else key for key, value in self.options)
        return f"{self.peer}/{self.mode}" + (f":{options}" if options else "")

    @property
    def is_plain(self) -> bool:
        """Whether it decodes without speculating (a server may do as it likes)."""
        return self.mode in _PLAIN


BASELINE = Contender(peer=OURS, mode="ar")


def parse_contender(name: str) -> Contender:
    """The contender of that name; whether it knows its options only its peer can tell.

    Raises:
        RequestError: there is no such peer.
    """
    peer, _, rest = name.partition("/")
    mode, _, tail = rest.partition(":")
    if peer not in MODES or not mode:
        raise RequestError(
            f"A contender must be PEER/MODE with a peer of {', '.join(MODES)}, got {name!r}."
        )
    pairs = (part.partition("=") for part in tail.split(",") if part)
    return Contender(peer=peer, mode=mode, options=tuple((key, value) for key, _, value in pairs))


def choose_contenders(peers: list[str], named: list[str], *, plain_only: bool) -> list[Contender]:
    """Those that are named, or every mode of the peers; plain decoding of ours always, and first.

    Raises:
        RequestError: a name is unknown, or speculation is asked for where only plain decoding
            makes sense.
    """
    wanted = named or [f"{peer}/{mode}" for peer in (OURS, *peers) for mode in MODES[peer]]
    contenders = [parse_contender(name) for name in wanted]
    if plain_only:
        speculating = [one.name for one in contenders if not one.is_plain]
        if named and speculating:
            raise RequestError(
                f"Random weights and prompts say nothing about speculation, got {speculating[0]}: "
                "name plain modes only, or another model."
            )
        contenders = [one for one in contenders if one.is_plain]
    return list(dict.fromkeys([BASELINE, *contenders]))
