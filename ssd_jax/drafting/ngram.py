"""n-gram drafting: tokens that followed the same n tokens before, without a second model.

Everything is pure, on the device and of fixed shapes. Learning a token and looking up a context
touch a constant number of table entries, however long the text. Every token of a draft is a point
mass. Texts only grow; a row that takes up another text needs a fresh state.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ssd_jax.drafting.ngram_map import MapState, draft_map, init_map, update_map
from ssd_jax.drafting.ngram_mod import ModState, draft_mod, init_mod, update_mod
from ssd_jax.drafting.ngram_simple import SimpleState, draft_simple, init_simple, update_simple
from ssd_jax.errors import RequestError
from ssd_jax.field_checks import MAX_INT32, Range, check_fields
from ssd_jax.types import Draft

NgramKind = Literal["simple", "map", "mod"]
NgramState = SimpleState | MapState | ModState

MAX_N = 64
MAX_DRAFT = 64
MAX_TABLE_SIZE = 1 << 30
DEFAULT_N = {"simple": 3, "map": 3, "mod": 6}
PROMPT_CHUNK = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NgramConfig:
    """Options of n-gram drafting.

    The defaults are far below llama.cpp's (n 12 and 48 tokens for simple and map; n 24 and 48 to 64
    tokens for mod), which only speak up in long repetitive texts: here a prompt of a few dozen
    tokens should gain too. Raise `n` where drafts are often rejected.

    Attributes:
        kind: "simple" copies from the last earlier occurrence of the last n tokens, "map" from
            their most frequent continuation, "mod" chains lookups in one table of constant size
            that all rows share.
        n: tokens that must be equal, 1 to 64; None is 3 for simple and map, whose drafts are one
            copied passage, and 6 for mod, whose every token is looked up anew and unverified.
        max_draft: most tokens in a draft, 1 to 64; a round verifies this many, drafted or not. 11
            and the token before them make passes of 12: a CPU computes rows by fours.
        min_draft: shorter drafts are dropped. Concerns mod alone: the others draft `max_draft`
            tokens or none.
        min_hits: how often the continuation must have followed the context (map only).
        table_size: entries of mod's table, 4 bytes each: a power of two. 16 MiB by default.
    """

    kind: NgramKind = "simple"
    n: Annotated[int, Range(f"from 1 to {MAX_N}", lambda n: 1 <= n <= MAX_N)] | None = None
    max_draft: Annotated[int, Range(f"from 1 to {MAX_DRAFT}", lambda n: 1 <= n <= MAX_DRAFT)] = 11
    min_draft: Annotated[int, Range("from 1 to max_draft", lambda n: n >= 1)] = 1
    min_hits: Annotated[int, Range(f"from 1 to {MAX_INT32}", lambda n: n >= 1)] = 1
    table_size: Annotated[
        int,
        Range(
            f"that is a power of two up to {MAX_TABLE_SIZE}",
            lambda n: 1 <= n <= MAX_TABLE_SIZE and n & (n - 1) == 0,
        ),
    ] = 1 << 22

    def __post_init__(self) -> None:
        check_fields(self, "{} of n-gram drafting")
        if self.min_draft > self.max_draft:
            raise RequestError(
                f"min_draft of n-gram drafting must be at most max_draft ({self.max_draft}), "
                f"got {self.min_draft}."
            )

    @property
    def context_len(self) -> int:
        """The n in use: the one asked for, or the kind's default."""
        return DEFAULT_N[self.kind] if self.n is None else self.n


def init_ngram(config: NgramConfig, batch_size: int, num_slots: int) -> NgramState:
    """The state that knows no text, for texts of up to `num_slots` tokens.

    simple holds 32 to 64 bytes a slot, map twice that, mod `4 * table_size` bytes for all rows.
    """
    match config.kind:
        case "simple":
            return init_simple(batch_size, num_slots)
        case "map":
            return init_map(batch_size, num_slots)
        case "mod":
            return init_mod(config.table_size)


def update_ngram(
    config: NgramConfig,
    state: NgramState,
    tokens: Int[Array, "B S"],
    known: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    width: int,
) -> NgramState:
    """The state that also knows the tokens at known .. lengths - 1 of each row.

    `width` is the most that any row may have got; tokens from known + width on would be skipped.
    Inside a loop the tables are written in place, provided that `tokens` or `lengths` come of the
    draft made from `state` (as they do in decoding): the compiler copies them if it may update
    before it drafts.
    """
    n = config.context_len
    match state:
        case SimpleState():
            return update_simple(state, tokens, known, lengths, n=n, width=width)
        case MapState():
            return update_map(state, tokens, known, lengths, n=n, width=width)
        case ModState():
            return update_mod(state, tokens, known, lengths, n=n, width=width)


def learn_prompt(
    config: NgramConfig,
    state: NgramState,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
) -> NgramState:
    """The state that also knows whole texts, learnt chunk by chunk in a loop on the device."""

    def unfinished(carry: tuple[Array, NgramState]) -> Array:
        return carry[0] < jnp.max(lengths)

    def learn(carry: tuple[Array, NgramState]) -> tuple[Array, NgramState]:
        start, state = carry
        known = jnp.full_like(lengths, start)
        state = update_ngram(config, state, tokens, known, lengths, width=PROMPT_CHUNK)
        return start + PROMPT_CHUNK, state

    return jax.lax.while_loop(unfinished, learn, (jnp.int32(0), state))[1]


def draft_ngram(
    config: NgramConfig,
    state: NgramState,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
) -> Draft:
    """What each text's last n tokens suggest to come next; no tokens for texts shorter than n.

    A draft may reach beyond the buffer or the row's limit: the caller cuts its count.
    """
    n, max_draft = config.context_len, config.max_draft
    match state:
        case SimpleState():
            return draft_simple(state, tokens, lengths, n=n, max_draft=max_draft)
        case MapState():
            return draft_map(
                state, tokens, lengths, n=n, max_draft=max_draft, min_hits=config.min_hits
            )
        case ModState():
            return draft_mod(
                state, tokens, lengths, n=n, max_draft=max_draft, min_draft=config.min_draft
            )
