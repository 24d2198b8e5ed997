"""Tiny random models of every family, and the naive computations that the tests compare with.

The reference is float64 numpy, without cache, batch or jit: the whole text goes through the whole
model for every token. It shares nothing with the package but the layout of the weights.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models

from ssd_jax.config import ModelConfig, RopeScaling
from ssd_jax.model import Model
from ssd_jax.models.init import abstract_params
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.text import Tokenizer
from ssd_jax.types import ModelParams

LOGIT_SPREAD = 3.0  # standard deviation of the logits
SMALLEST_GAP = (
    1e-3  # best less second best: far above float32's error, so that no token is a toss-up
)

_LLAMA = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=1024,
)
_LLAMA3_ROPE = RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=64
)
CONFIGS = {
    "llama": _LLAMA,
    "llama_tied": dataclasses.replace(
        _LLAMA,
        num_kv_heads=4,
        tied_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    # With this base the four pairs of a head lie in all three bands of the scaling.
    "llama3_rope": dataclasses.replace(_LLAMA, rope_scaling=_LLAMA3_ROPE, rope_theta=625.0),
    "qwen2": dataclasses.replace(
        _LLAMA, family="qwen2", num_kv_heads=1, qkv_bias=True, tied_embeddings=True
    ),
    "qwen3": dataclasses.replace(_LLAMA, family="qwen3", head_dim=16, qk_norm=True),
}
FAMILY_NAMES = tuple(CONFIGS)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TinyModel:
    """A configuration, its float32 weights, and the same weights in float64 numpy."""

    config: ModelConfig
    params: ModelParams
    weights: ModelParams

    @property
    def model(self) -> Model:
        """What `generate` takes, for prompts of token ids."""
        return Model(config=self.config, params=self.params, tokenizer=None)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [T, V] at every position of a text, float64."""
        return reference_logits(self.config, self.weights, ids)

    def continuation(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        params: SamplingParams | None = None,
        noise: Sequence[np.ndarray] | None = None,
    ) -> list[int]:
        """The next `num_tokens` tokens, with the law that `params` asks for (greedy without).

        `noise[i]` [V] is added to the log-probabilities of output token i before its argmax. A
        choice too close to call fails the test: it needs another prompt.
        """
        params = params or SamplingParams()
        output: list[int] = []
        for step in range(num_tokens):
            logits = self.logits([*prompt, *output])[-1]
            if params.temperature == 0:
                scores = reference_penalties(logits, params, prompt, output)
            else:
                scores = reference_law(logits, params, prompt, output)
            if noise is not None:
                scores = scores + noise[step]
            second, best = np.sort(scores)[-2:]
            assert best - second > SMALLEST_GAP, f"near tie at output token {step}"
            output.append(int(np.argmax(scores)))
        return output


@functools.cache
def tiny(name: str) -> TinyModel:
    """The tiny model of that name in `CONFIGS`, made once."""
    return make_tiny(CONFIGS[name])


def make_tiny(config: ModelConfig, seed: int = 0) -> TinyModel:
    """A tiny model: its logits vary by several units, its norms and biases are not trivial."""
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        name, noise = path[-1].name, rng.standard_normal(leaf.shape)
        if name.endswith("norm"):
            return 1 + 0.2 * noise
        if name.endswith("bias"):
            return 0.3 * noise
        if name in ("embedding", "lm_head"):
            return LOGIT_SPREAD * config.hidden_size**-0.5 * noise
        num_inputs = math.prod(leaf.shape[:-1]) if name == "output" else leaf.shape[0]
        return 1.5 * num_inputs**-0.5 * noise

    tree = jax.tree_util.tree_map_with_path(weight, abstract_params(config, np.float32))
    params = jax.tree.map(lambda x: jnp.asarray(x.astype(np.float32)), tree)
    weights = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), params)
    return TinyModel(config=config, params=params, weights=weights)


def perturbed(model: Model, scale: float, seed: int = 1) -> Model:
    """The model with noise of `scale` standard deviations on each of its arrays: a worse draft."""
    rng = np.random.default_rng(seed)

    def blur(leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return leaf + np.float32(scale) * jnp.std(leaf) * noise

    return dataclasses.replace(model, params=jax.tree.map(blur, model.params))


@functools.cache
def tiny_tokenizer(eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    """A byte-level tokenizer: letters, a space, the two bytes of "é", three longer tokens, "</s>".

    It knows fewer ids than the tiny models have rows in their embeddings.
    """
    two_bytes = "\u00c3\u00a9"  # how byte-level tokenizers write C3 A9
    tokens = [*string.ascii_letters, "\u0120", *two_bytes, "th", "He", "oo"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(
        backend=backend,
        special_tokens={"eos_token": "</s>"},
        bos_id=None,
        eos_ids=eos_ids,
        chat_template=None,
        processor_adds_bos=False,
        config_adds_bos=False,
    )


def prompt_ids(length: int, seed: int = 0, vocab_size: int = 48) -> list[int]:
    """A random prompt; the default keeps to ids that the tests' small tokenizer knows."""
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()


def reference_logits(config: ModelConfig, weights: ModelParams, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a text: every token attends to itself and to all before it."""
    x = weights.embedding[np.asarray(ids)]
    num_tokens, eps = len(ids), config.rms_norm_eps
    turns = np.exp(1j * np.outer(np.arange(num_tokens), reference_frequencies(config)))
    hidden_future = np.triu(np.ones((num_tokens, num_tokens), bool), 1)
    for layer in weights.layers:
        normed = _normalise(x, layer.attention_norm, eps)
        attended = np.zeros_like(x)
        for group in range(config.num_kv_heads):
            heads = [
                normed @ layer.qkv[:, group, i]
                + (0 if layer.qkv_bias is None else layer.qkv_bias[group, i])
                for i in range(config.queries_per_kv + 2)
            ]
            *queries, key, value = heads
            if config.qk_norm:
                queries = [_normalise(query, layer.query_norm, eps) for query in queries]
                key = _normalise(key, layer.key_norm, eps)
            key = _rotate(key, turns)
            for i, query in enumerate(queries):
                scores = _rotate(query, turns) @ key.T / math.sqrt(config.head_dim)
                scores[hidden_future] = -np.inf
                attended += (_softmax(scores) @ value) @ layer.output[group, i]
        x = x + attended + (0 if layer.output_bias is None else layer.output_bias)
        normed = _normalise(x, layer.mlp_norm, eps)
        gate, up = (
            normed @ layer.gate_up[:, i]
            + (0 if layer.gate_up_bias is None else layer.gate_up_bias[i])
            for i in range(2)
        )
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down
        x = x + (0 if layer.down_bias is None else layer.down_bias)
    x = _normalise(x, weights.final_norm, eps)
    return x @ (weights.embedding.T if weights.lm_head is None else weights.lm_head)


def reference_frequencies(config: ModelConfig) -> np.ndarray:
    """RoPE's radians per token [H/2]; Llama 3.1's scaling told in wavelengths."""
    half = config.head_dim // 2
    plain = [config.rope_theta ** (-pair / half) for pair in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return np.array(plain)
    if scaling.kind == "linear":
        return np.array(plain) / scaling.factor
    longest_kept = scaling.original_max_context / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_context / scaling.low_freq_factor
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < longest_kept:
            scaled.append(frequency)
        elif wavelength > shortest_slowed:
            scaled.append(frequency / scaling.factor)
        else:
            blend = scaling.original_max_context / wavelength - scaling.low_freq_factor
            blend /= scaling.high_freq_factor - scaling.low_freq_factor
            scaled.append((1 - blend) * frequency / scaling.factor + blend * frequency)
    return np.array(scaled)


def reference_penalties(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    """Logits [V] after penalties and bias, one token after the other."""
    logits = np.array(logits, np.float64)
    for token in {*prompt, *output}:
        if logits[token] > 0:
            logits[token] /= np.float32(params.repetition_penalty)
        else:
            logits[token] *= np.float32(params.repetition_penalty)
    for token in set(output):
        logits[token] -= params.presence_penalty
    for token in output:
        logits[token] -= params.frequency_penalty
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    return logits


def reference_law(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> np.ndarray:
    """Log-probabilities [V] of the next token, in `sampling`'s order and with its tie rule."""
    logits = reference_penalties(logits, params, prompt, output)
    if params.temperature == 0:
        law = np.full(logits.shape, -np.inf)
        law[np.argmax(logits)] = 0.0
        return law
    logits = logits / np.float64(np.float32(params.temperature))
    ranked = np.sort(logits)[::-1][: params.top_k or None]
    threshold = ranked[-1]
    if params.top_p < 1:
        mass = 0.0
        for value, probability in zip(ranked, _softmax(ranked), strict=True):
            threshold, mass = value, mass + probability
            if mass >= np.float32(params.top_p):
                break
    kept = logits >= threshold
    if params.min_p > 0:
        kept &= np.exp(logits - logits.max()) >= np.float32(params.min_p)
    kept &= np.isfinite(logits)
    law = np.full(logits.shape, -np.inf)
    law[kept] = np.log(_softmax(logits[kept]))
    return law


def _normalise(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def _rotate(heads: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Heads [T, H] with dimension i and i + H/2 taken as one complex number and turned."""
    half = heads.shape[-1] // 2
    turned = (heads[:, :half] + 1j * heads[:, half:]) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
