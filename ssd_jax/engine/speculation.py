"""What speculation is asked to do, checked against the target it is for."""

import dataclasses
from typing import get_args

from ssd_jax.drafting.ngram import NgramConfig
from ssd_jax.errors import ConfigError, RequestError
from ssd_jax.model import Model
from ssd_jax.text import Tokenizer
from ssd_jax.verification import Verification

MAX_DRAFT_LEN = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Who drafts, how much, and how drafts are verified.

    Attributes:
        draft: the model that proposes tokens (its vocabulary must be the target's), or options of
            n-gram drafting, which needs no model.
        draft_len: tokens that a draft model proposes in a round, 1 to 64. For n-grams it is always
            the `max_draft` of their options.
        verification: "coupled" emits the very tokens of autoregressive decoding with the same seed;
            "rejection" emits tokens of the same distribution and accepts more of them. Greedy rows
            are the same under both.
    """

    draft: Model | NgramConfig
    draft_len: int = 4
    verification: Verification = "coupled"

    def __post_init__(self) -> None:
        if isinstance(self.draft, NgramConfig):
            object.__setattr__(self, "draft_len", self.draft.max_draft)
        whole = isinstance(self.draft_len, int) and not isinstance(self.draft_len, bool)
        if not whole or not 1 <= self.draft_len <= MAX_DRAFT_LEN:
            raise RequestError(
                f"draft_len must be from 1 to {MAX_DRAFT_LEN} tokens, got {self.draft_len!r}."
            )
        if self.verification not in get_args(Verification):
            raise RequestError(
                f"verification must be one of {', '.join(get_args(Verification))}, "
                f"got {self.verification!r}."
            )


def check_pair(target: Model, draft: Model) -> None:
    """Refuse a draft that does not speak the target's vocabulary or has a shorter context.

    Embeddings padded to different sizes are fine; the maps between tokens and ids must agree.

    Raises:
        ConfigError: naming the first id at which they differ, or both contexts.
    """
    if draft.config.max_context < target.config.max_context:
        raise ConfigError(
            f"The draft's context must be at least the target's, got {draft.config.max_context} "
            f"against {target.config.max_context} tokens: choose another draft model."
        )
    if target.tokenizer is None or draft.tokenizer is None:
        if target.config.vocab_size != draft.config.vocab_size:
            raise ConfigError(
                "Without tokenizers, target and draft must have the same vocab_size, got "
                f"{target.config.vocab_size} and {draft.config.vocab_size}."
            )
        return
    if target.vocabulary == draft.vocabulary:
        return  # quickly, since every call comes by here
    mismatch = first_mismatch(target.tokenizer, draft.tokenizer)
    if mismatch is not None:
        token_id, ours, theirs = mismatch
        raise ConfigError(
            f"Target and draft must share one vocabulary, but id {token_id} is {ours!r} for the "
            f"target and {theirs!r} for the draft: choose a draft of the same tokenizer."
        )


def first_mismatch(one: Tokenizer, other: Tokenizer) -> tuple[int, str | None, str | None] | None:
    """The lowest id that two tokenizers give to different tokens, with both tokens, or None."""
    by_id = [
        {token_id: token for token, token_id in tokenizer.vocabulary().items()}
        for tokenizer in (one, other)
    ]
    for token_id in sorted(by_id[0].keys() | by_id[1].keys()):
        tokens = by_id[0].get(token_id), by_id[1].get(token_id)
        if tokens[0] != tokens[1]:
            return token_id, *tokens
    return None
