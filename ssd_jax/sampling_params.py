"""Sampling options of one request, validated where they are made."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from ssd_jax.field_checks import MAX_INT32, MIN_FLOAT32, Range, TokenId, check_fields

SMALLEST_TEMPERATURE = 1e-5

type Bias = Annotated[float, Range("below infinity", lambda bias: bias < math.inf, wide=True)]
type StopString = Annotated[str, Range("that is not empty", lambda text: text != "")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of sampling; greedy unless told otherwise.

    Attributes:
        max_tokens: most tokens to emit, None for as many as the context holds.
        temperature: 0 is greedy, and so is what is below 0.00001: logits over it may overflow.
        top_k: keep the k most likely tokens, 0 for all.
        top_p: keep the smallest set of tokens with this much probability, in (0, 1].
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1).
        repetition_penalty: above 0, 1 for none; on ids of prompt and output.
        presence_penalty: subtracted from the logit of every id already emitted.
        frequency_penalty: the same, once for each time it was emitted.
        logit_bias: added to logits, by token id; minus infinity forbids a token.
        seed: 64-bit number; None draws one, which the completion reports.
        stop: one string or several that end the output; they are not part of it. One that is a
            special token ends it by its id.
        stop_token_ids: ids that end the output besides the model's own EOS ids.
        ignore_eos: do not stop at the model's EOS ids.
        logprobs: None for none, else how many of the most likely tokens to report at each position,
            besides the chosen one (0 to 64).
    """

    max_tokens: Annotated[int, Range("of at least 1", lambda n: n >= 1)] | None = None
    temperature: Annotated[float, Range("of at least 0 (0 is greedy)", lambda t: t >= 0)] = 0.0
    top_k: Annotated[int, Range(f"from 0 to {MAX_INT32} (0 is off)", lambda k: k >= 0)] = 0
    top_p: Annotated[float, Range("in (0, 1]", lambda p: 0 < p <= 1)] = 1.0
    min_p: Annotated[float, Range("in [0, 1)", lambda p: 0 <= p < 1)] = 0.0
    repetition_penalty: Annotated[
        float, Range("above 0 (1 is off)", lambda x: x >= MIN_FLOAT32)
    ] = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[TokenId, Bias] = dataclasses.field(default_factory=dict)
    seed: (
        Annotated[int, Range("of 64 bits and at least 0", lambda n: 0 <= n < 2**64, wide=True)]
        | None
    ) = None
    stop: StopString | Sequence[StopString] = ()
    stop_token_ids: Sequence[TokenId] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Range("from 0 to 64", lambda n: 0 <= n <= 64)] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self)
        if self.temperature < SMALLEST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
