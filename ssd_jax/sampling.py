"""From logits to a law to a token: the only place where logits are warped, always in float32.

Order: repetition penalty, presence and frequency penalties, logit bias, temperature, top-k, top-p,
min-p. Randomness is keyed by (seed, absolute position, purpose) and by nothing else, so a row's
draws depend neither on its batch neighbours nor on the decoding method.

Logits may hold NaN, or leave no token possible, or be infinite. Such a row has no law, and its
token is NO_TOKEN, by which `decoding.emission` ends the row. That costs nothing: a row's maximum,
which is computed anyway, is then not finite.
"""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from ssd_jax.types import NO_TOKEN, Sampling


class Purpose(enum.IntEnum):
    """What a random number is for; draws for different purposes are independent."""

    TOKEN = 0  # the target's own choice; under coupled verification the draft's too
    DRAFT = 1  # a draft's choice under rejection sampling
    ACCEPT = 2  # whether a drafted token is accepted
    HIT = 3  # whether an outcome counts as prepared, where hits are made up


def warp(
    logits: Float[Array, "B V"], sampling: Sampling, output_counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Log-probabilities of the law that each row's next token is drawn from.

    A greedy row (temperature 0) gets a point mass on its most likely token, the lowest id among
    equals. Tokens tied with the last one that top-k or top-p admits are admitted too. A row without
    a law gets one in which no token is possible: all minus infinity, or NaN.
    """
    logits = penalize(logits, sampling, output_counts)
    best = first_argmax(logits)
    greedy = sampling.temperature == 0
    vocabulary = jnp.arange(logits.shape[-1], dtype=best.dtype)
    point_mass = jnp.where(vocabulary == best[:, None], 0.0, -jnp.inf)

    def warp_rows() -> Float[Array, "B V"]:
        scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
        truncated = jax.nn.log_softmax(truncate(scaled, sampling), axis=-1)
        return jnp.where(greedy[:, None], point_mass, truncated)

    return jax.lax.cond(jnp.all(greedy), lambda: point_mass, warp_rows)


def penalize(
    logits: Float[Array, "B V"], sampling: Sampling, output_counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Logits after penalties and bias.

    The repetition penalty divides positive and multiplies negative logits of every id seen in
    prompt or output (Keskar et al. 2019); presence and frequency penalties count the output only
    (OpenAI).
    """
    logits = logits.astype(jnp.float32)
    seen = sampling.prompt_tokens | (output_counts > 0)
    factor = sampling.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen, repeated, logits)
    counts = output_counts.astype(jnp.float32)
    logits = logits - sampling.presence_penalty[:, None] * jnp.minimum(counts, 1.0)
    logits = logits - sampling.frequency_penalty[:, None] * counts
    return logits + sampling.logit_bias


def truncate(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits with everything outside top-k, top-p and min-p at minus infinity.

    Nothing is sorted when no row asks for top-k or top-p.
    """
    vocab_size = logits.shape[-1]
    top_k = jnp.where(sampling.top_k == 0, vocab_size, jnp.minimum(sampling.top_k, vocab_size))

    def sorted_threshold() -> Float[Array, "B 1"]:
        descending = -jnp.sort(-logits, axis=-1)
        ranks = jnp.arange(vocab_size, dtype=top_k.dtype)
        within_k = ranks < top_k[:, None]
        probs = jax.nn.softmax(jnp.where(within_k, descending, -jnp.inf), axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        top_p = sampling.top_p[:, None]
        # Rounded sums of all mass may exceed 1: top_p 1 must not cut the tail then.
        within_p = within_k & ((mass_before < top_p) | (ranks == 0) | (top_p >= 1))
        last = jnp.sum(within_p, axis=-1, keepdims=True) - 1
        threshold = jnp.take_along_axis(descending, last, axis=-1)
        off = (top_k == vocab_size) & (sampling.top_p >= 1)
        return jnp.where(off[:, None], -jnp.inf, threshold)

    threshold = jax.lax.cond(
        jnp.any((top_k < vocab_size) | (sampling.top_p < 1)),
        sorted_threshold,
        lambda: jnp.full((logits.shape[0], 1), -jnp.inf, logits.dtype),
    )
    best = jnp.max(logits, axis=-1, keepdims=True)
    threshold = jnp.maximum(threshold, best + jnp.log(sampling.min_p)[:, None])
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample_tokens(
    law: Float[Array, "B V"],
    sampling: Sampling,
    positions: Int[Array, "B"],
    purpose: Purpose = Purpose.TOKEN,
) -> Int[Array, "B"]:
    """One token a row from its log-probabilities, for the given absolute positions in the text.

    NO_TOKEN where no token is possible.

    The Gumbel-max trick: argmax of log-probability plus position-keyed noise. A point mass needs no
    noise, so a batch of greedy rows draws none.
    """

    def draw() -> Int[Array, "B"]:
        noise = gumbel_noise(sampling.seed, positions, purpose, law.shape[-1])
        return first_argmax(law + noise)

    all_greedy = jnp.all(sampling.temperature == 0)
    return jax.lax.cond(all_greedy, lambda: first_argmax(law), draw)


def first_argmax(values: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The lowest index of each row's maximum; NO_TOKEN where that is NaN or infinite.

    Two plain reductions: XLA's CPU backend does not vectorise argmax, which takes eight times as
    long.
    """
    size = values.shape[-1]
    indices = jnp.arange(size, dtype=jnp.int32)
    best = jnp.max(values, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(values == best, indices, size), axis=-1)
    return jnp.where(jnp.isfinite(best[..., 0]), first, NO_TOKEN)


def gumbel_noise(
    seed: UInt32[Array, "B 2"], positions: Int[Array, "B"], purpose: Purpose, vocab_size: int
) -> Float[Array, "B V"]:
    """Standard Gumbel noise of each row's (seed, position, purpose)."""
    keys = jax.vmap(position_key, in_axes=(0, 0, None))(seed, positions, purpose)
    return jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32))(keys)


def position_key(
    seed: UInt32[Array, "2"], position: Int[Array, ""], purpose: Purpose
) -> Key[Array, ""]:
    """The random key of one position of one request, for one purpose."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, position), int(purpose))


def reported_logprobs(
    logits: Float[Array, "B V"], sampling: Sampling, output_counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Log-probabilities that are shown to a user: the row's warped law, in the same float32.

    A greedy row's own law is a point mass, which would say nothing; it reports the law at
    temperature 1 without truncation, after penalties and bias.
    """
    law = warp(logits, sampling, output_counts)
    plain = jax.nn.log_softmax(penalize(logits, sampling, output_counts), axis=-1)
    return jnp.where((sampling.temperature == 0)[:, None], plain, law)


def over_positions(
    function: Callable[..., Array],
    values: Float[Array, "B T V"],
    *others: Array,
    sampling: Sampling,
) -> Array:
    """A function of rows (`warp`, `sample_tokens` ...) at T positions or branches of every row.

    `others` have a T axis as well, and so has the result.
    """
    return jax.vmap(
        lambda row_values, *rest: function(row_values, sampling, *rest), in_axes=1, out_axes=1
    )(values, *others)


def counts_along_draft(
    output_counts: Int[Array, "B V"], drafted: Int[Array, "B J"]
) -> Int[Array, "B J+1 V"]:
    """Emitted-token counts as they would be after 0, 1, ... J of the drafted tokens."""
    vocabulary = jnp.arange(output_counts.shape[-1], dtype=drafted.dtype)
    added = jnp.cumsum((drafted[..., None] == vocabulary).astype(jnp.int32), axis=1)
    first = output_counts[:, None]
    return jnp.concatenate([first, first + added], axis=1)
