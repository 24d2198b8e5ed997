"""From prompts and sampling options to the padded arrays that the device programs take."""

import dataclasses
import secrets
from collections.abc import Sequence

import jax
import numpy as np

from ssd_jax.buckets import bucket_batch, bucket_count, bucket_slots, prefill_chunks
from ssd_jax.config import ModelConfig
from ssd_jax.decoding.finish import Finish
from ssd_jax.engine.memory_need import BatchShape, require_batch
from ssd_jax.engine.speculation import Speculation
from ssd_jax.engine.ssd_options import SSD
from ssd_jax.errors import RequestError, shown
from ssd_jax.field_checks import check
from ssd_jax.jax_settings import check_jax_settings
from ssd_jax.model import Model
from ssd_jax.placement import home
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.text import Tokenizer
from ssd_jax.types import Sampling

type Prompts = Sequence[str | Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row to decode: its prompt as ids, its options, the seed that will be used."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests as arrays; rows past the requests only fill up the batch's padded size."""

    requests: tuple[Request, ...]
    sampling: Sampling
    tokens: np.ndarray  # [B, S] int32
    lengths: np.ndarray  # [B] int32
    finish: np.ndarray  # [B] int32
    chunks: tuple[tuple[int, int], ...]
    num_top_logprobs: int | None
    max_steps: int


def make_requests(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
) -> tuple[Request, ...]:
    """Requests from prompts (text, or token ids as they are) and one set of options or one each.

    Raises:
        RequestError: an empty or too long prompt, an id outside the vocabulary, more tokens asked
        for
            than the context holds, or numbers of prompts and options that differ.
    """
    check_jax_settings()
    check("model", model, Model)
    if isinstance(prompts, str):
        raise RequestError(
            "prompts must be a list of texts or of token ids, got one text: wrap it."
        )
    prompts = check("prompts", prompts, Prompts)
    params = check("params", params, SamplingParams | Sequence[SamplingParams])
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    if len(params) != len(prompts) or not prompts:
        raise RequestError(
            f"There must be one prompt at least, and one SamplingParams for all or for each, got "
            f"{len(prompts)} prompts and {len(params)} SamplingParams."
        )
    return tuple(
        _make_request(model, prompt, options)
        for prompt, options in zip(prompts, params, strict=True)
    )


def _make_request(model: Model, prompt: str | Sequence[int], params: SamplingParams) -> Request:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise RequestError("This model has no tokenizer: give the prompt as token ids.")
        ids = tuple(model.tokenizer.encode(prompt))
    else:
        ids = tuple(prompt)
    context, vocab_size = model.config.max_context, model.config.vocab_size
    if not ids:
        raise RequestError(
            "The prompt is empty, and this tokenizer adds no token in front of it, so there is "
            "nothing to predict from: give at least one token."
        )
    named = {
        "a prompt": ids,
        "logit_bias": params.logit_bias,
        "stop_token_ids": params.stop_token_ids,
    }
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"Token ids of {name} must be from 0 to {vocab_size - 1} for this model, got "
                    f"{token}: give ids of its vocabulary."
                )
    if len(ids) >= context:
        raise RequestError(
            f"The prompt has {len(ids)} tokens, but the model's context holds {context} and one is "
            f"needed for the answer: shorten the prompt to {context - 1} tokens."
        )
    if params.max_tokens is not None and len(ids) + params.max_tokens > context:
        raise RequestError(
            f"A prompt of {len(ids)} tokens and max_tokens {params.max_tokens} exceed the model's "
            f"context of {context}: lower max_tokens to {context - len(ids)} or shorten the prompt."
        )
    if params.stop:
        if model.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and this model has none.")
        ids_of_stops = _special_stop_ids(model.tokenizer, params.stop)
        params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *ids_of_stops))
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return Request(prompt_ids=ids, params=params, seed=seed)


def _special_stop_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[int, ...]:
    """Ids of the stop strings that are special tokens: the text, without those, never shows them.

    Raises:
        RequestError: a stop string that holds a special token beside other text.
    """
    specials = tokenizer.special_tokens_by_text()
    for stop in stops:
        for text, token_id in specials.items():
            if text in stop and stop not in specials:
                raise RequestError(
                    f"The stop string {shown(stop)} holds the special token {shown(text)}, "
                    f"which is never in the text: use {shown(text)} alone, or "
                    f"stop_token_ids=({token_id},)."
                )
    return tuple(specials[stop] for stop in stops if stop in specials)


def make_batch(
    model: Model,
    requests: Sequence[Request],
    draft_len: int = 0,
    speculation: Speculation | SSD | None = None,
) -> Batch:
    """The requests as padded arrays on the host (options already on the model's devices).

    A pass over a draft writes up to `draft_len` slots past the text, which is room set aside here;
    what `speculation` takes counts in what has to fit the memory.

    Raises:
        MemoryBudgetError: the batch would not fit a device's memory.
    """
    config = model.config
    num_rows = bucket_batch(len(requests))
    lengths = [len(request.prompt_ids) for request in requests]
    max_lengths = [_max_length(config, request) for request in requests]
    chunks = prefill_chunks(max(lengths) - 1)
    longest = max(*max_lengths, 1) + draft_len
    num_slots = bucket_slots(max(longest, *(start + size for start, size in chunks), 1))
    asked = [r.params.logprobs for r in requests if r.params.logprobs is not None]
    num_top_logprobs = min(bucket_count(max(asked)), config.vocab_size) if asked else None
    shape = BatchShape(num_rows=num_rows, num_slots=num_slots, num_top_logprobs=num_top_logprobs)
    require_batch(model, shape, speculation)
    padding = num_rows - len(requests)
    tokens = np.zeros((num_rows, num_slots), np.int32)
    for row, request in enumerate(requests):
        tokens[row, : lengths[row]] = request.prompt_ids
    return Batch(
        requests=tuple(requests),
        sampling=_make_sampling(model, requests, num_rows, max_lengths),
        tokens=tokens,
        lengths=np.array(lengths + [1] * padding, np.int32),
        finish=np.array([Finish.RUNNING] * len(requests) + [Finish.STOP] * padding, np.int32),
        chunks=tuple(chunks),
        num_top_logprobs=num_top_logprobs,
        max_steps=max(end - start for end, start in zip(max_lengths, lengths, strict=True)),
    )


def _max_length(config: ModelConfig, request: Request) -> int:
    """Tokens of prompt and output at which the request ends."""
    if request.params.max_tokens is None:
        return config.max_context
    return len(request.prompt_ids) + request.params.max_tokens


def _make_sampling(
    model: Model, requests: Sequence[Request], num_rows: int, max_lengths: Sequence[int]
) -> Sampling:
    vocab_size, tokenizer = model.config.vocab_size, model.tokenizer
    neutral = SamplingParams(seed=0)
    padding = num_rows - len(requests)
    options = [request.params for request in requests] + [neutral] * padding
    bias = np.zeros((num_rows, vocab_size), np.float32)
    prompt_tokens = np.zeros((num_rows, vocab_size), bool)
    eos_ids = []
    for row, params in enumerate(options):
        bias[row, list(params.logit_bias)] = list(params.logit_bias.values())
        own = () if params.ignore_eos or tokenizer is None else tokenizer.eos_ids
        eos_ids.append(sorted({*own, *params.stop_token_ids}))
    bias[:, model.unknown_ids] = -np.inf
    for row, request in enumerate(requests):
        prompt_tokens[row, list(request.prompt_ids)] = True
    num_eos = bucket_count(max(1, *map(len, eos_ids)))
    eos = np.array([ids + [-1] * (num_eos - len(ids)) for ids in eos_ids], np.int32)
    seeds = [request.seed for request in requests] + [0] * padding
    words = np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(params, name) for params in options], dtype)

    columns = {
        "temperature": column("temperature", np.float32),
        "top_k": column("top_k", np.int32),
        "top_p": column("top_p", np.float32),
        "min_p": column("min_p", np.float32),
        "repetition_penalty": column("repetition_penalty", np.float32),
        "presence_penalty": column("presence_penalty", np.float32),
        "frequency_penalty": column("frequency_penalty", np.float32),
        "logit_bias": bias,
        "prompt_tokens": prompt_tokens,
        "seed": words,
        "eos_ids": eos,
        "max_length": np.array([*max_lengths, *[1] * padding], np.int32),
    }
    # Anywhere else, every dispatch would copy them to the devices of the weights.
    return Sampling(**jax.device_put(columns, home(model)))
