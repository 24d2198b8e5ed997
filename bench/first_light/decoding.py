"""Plain decoding of random Llamas in bfloat16 beside the time it takes to read their weights."""

import statistics
from collections.abc import Callable

import jax
import numpy as np

from bench.first_light.profiles import describe, kernels_of
from bench.kernel_speed import copy_bandwidth
from bench.timing import time_parts
from ssd_jax import Model, ModelConfig, SamplingParams
from ssd_jax.engine.batch import make_requests
from ssd_jax.engine.round_times import measure_pass_times
from ssd_jax.generation import choose_method
from ssd_jax.model import DTypeName
from ssd_jax.models.init import random_params

PROMPT, NEW_TOKENS = 128, 128
GOAL = 0.9  # of the bandwidth bound

type Tell = Callable[..., None]


def llama(size: str) -> ModelConfig:
    """The shape of a Llama 3 of that size, or of a draft for one."""
    sizes = {  # hidden, intermediate, layers, heads, kv heads, head dim, vocabulary
        "tiny": (64, 128, 2, 2, 1, 64, 512),
        "tiny draft": (64, 64, 1, 1, 1, 64, 512),
        "40M": (256, 768, 4, 4, 2, 64, 128256),
        "140M": (768, 2048, 6, 12, 4, 64, 128256),
        "1B": (2048, 8192, 16, 32, 8, 64, 128256),
        "8B": (4096, 14336, 32, 32, 8, 128, 128256),
    }
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = sizes[size]
    return ModelConfig(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=2048,
        rope_theta=500000.0,
        tied_embeddings=size != "8B",
    )


def random_model(size: str, seed: int = 0, dtype: DTypeName = "bfloat16") -> Model:
    """A model of that shape with random weights, made on the device."""
    config = llama(size)
    return Model(config=config, params=random_params(config, seed, dtype), tokenizer=None)


def weight_bytes(model: Model) -> int:
    """Bytes that a pass of few tokens reads of the weights: all but an embedding that is looked up.

    A tied embedding is the output matrix, which is read whole.
    """
    params = model.params
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return total - (params.embedding.nbytes if params.lm_head is not None else 0)


def some_prompt(config: ModelConfig, length: int = PROMPT) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(0).integers(0, config.vocab_size, length).tolist()


def passes(*, tell: Tell, dry_run: bool, size: str, widths: list[int]) -> None:
    """Tokens a second, and seconds of a pass of more tokens, beside reading the weights once."""
    bandwidth = copy_bandwidth(0.01 if dry_run else 2.0) * 1e9
    model = random_model(size)
    bound = weight_bytes(model) / bandwidth
    tell(
        "bound",
        f"{weight_bytes(model) / 1e9:.2f} GB at {bandwidth / 1e9:.0f} GB/s: {bound * 1e3:.3f} ms",
    )
    new_tokens = 16 if dry_run else NEW_TOKENS
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=0)
    prompts = [some_prompt(model.config)]
    time_parts(model, prompts, [params], None)
    timings = [time_parts(model, prompts, [params], None) for _ in range(2 if dry_run else 5)]
    seconds = statistics.median(one.decode_s for one in timings) / (new_tokens - 1)
    tell(
        "plain decoding",
        f"{1 / seconds:.1f} tokens/s, {seconds * 1e3:.3f} ms a token, {bound / seconds:.0%} of the "
        f"bound (goal {GOAL:.0%})",
        seconds=seconds,
        share=bound / seconds,
    )
    prefill = statistics.median(one.prefill_s for one in timings)
    tell("prefill", f"{prefill * 1e3:.2f} ms for {PROMPT} tokens", seconds=prefill)
    method, batch = choose_method(model, make_requests(model, prompts, [params]), None)
    parts = kernels_of(lambda: method.advance(batch, method.prefill(batch), 4))
    if parts:
        tell("kernels", "prefill and 4 steps: " + describe(parts, 1))
    for width in widths:  # each is compiled, which takes long: told one by one
        spent = measure_pass_times(model, [width])[width]
        tell(
            f"pass of {width}",
            f"{spent * 1e3:.3f} ms, {spent / bound:.2f}x the bound",
            seconds=spent,
        )
