"""Sampling options of one request, validated where they are made."""

import dataclasses
import math
from collections.abc import Mapping

from ssd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of sampling; greedy unless told otherwise.

    Attributes:
        max_tokens: most tokens to emit, None for as many as the context holds.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens, 0 for all.
        top_p: keep the smallest set of tokens with this much probability, in (0, 1].
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1).
        repetition_penalty: above 0, 1 for none; on ids of prompt and output.
        presence_penalty: subtracted from the logit of every id already emitted.
        frequency_penalty: the same, once for each time it was emitted.
        logit_bias: added to logits, by token id.
        seed: 64-bit number; None draws one, which the completion reports.
        stop: strings that end the output; they are not part of it. One that is a special token
            ends it by its id.
        stop_token_ids: ids that end the output besides the model's own EOS ids.
        ignore_eos: do not stop at the model's EOS ids.
        logprobs: None for none, else how many of the most likely tokens to report at each position,
            besides the chosen one (0 to 64).
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require_finite("temperature", self.temperature)
        _require(self.temperature >= 0, "temperature", "at least 0 (0 is greedy)", self.temperature)
        _require(self.top_k >= 0, "top_k", "at least 0 (0 is off)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p < 1, "min_p", "in [0, 1)", self.min_p)
        _require_finite("repetition_penalty", self.repetition_penalty)
        _require(
            self.repetition_penalty > 0,
            "repetition_penalty",
            "above 0 (1 is off)",
            self.repetition_penalty,
        )
        _require_finite("presence_penalty", self.presence_penalty)
        _require_finite("frequency_penalty", self.frequency_penalty)
        for token, bias in self.logit_bias.items():
            _require(not math.isnan(bias) and bias != math.inf, "logit_bias", "a number", bias)
            _require(token >= 0, "logit_bias", "keyed by token ids of at least 0", token)
        if self.seed is not None:
            _require(0 <= self.seed < 2**64, "seed", "a 64-bit number of at least 0", self.seed)
        _require(all(self.stop), "stop", "made of non-empty strings", self.stop)
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= 64, "logprobs", "from 0 to 64", self.logprobs)


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise RequestError(f"{name} must be {expected}, got {value!r}.")


def _require_finite(name: str, value: float) -> None:
    _require(math.isfinite(value), name, "a finite number", value)
