"""What a request will take and what the device has, compared before anything is allocated."""

import jax
import jax.numpy as jnp
import psutil
from jaxtyping import DTypeLike

from ssd_jax.buckets import PREFILL_CHUNK
from ssd_jax.config import ModelConfig
from ssd_jax.errors import MemoryBudgetError
from ssd_jax.kv_cache import cache_bytes


def params_bytes(config: ModelConfig, dtype: DTypeLike, *, own_output: bool = False) -> int:
    """Bytes of a model's weights; with `own_output` a tied output matrix is stored as well."""
    count = config.num_params
    if own_output and config.tied_embeddings:
        count += config.vocab_size * config.hidden_size
    return count * jnp.dtype(dtype).itemsize


def batch_bytes(config: ModelConfig, batch_size: int, num_slots: int, dtype: DTypeLike) -> int:
    """Bytes that decoding takes besides the weights: cache, options, largest activations."""
    # Per row and vocabulary entry: bias and counts, prompt mask, and six float32 laws in flight.
    options = batch_size * config.vocab_size * (4 + 4 + 1 + 6 * 4)
    chunk = min(PREFILL_CHUNK, num_slots)
    scores = 4 * 2 * batch_size * config.num_heads * chunk * num_slots
    activations = 4 * batch_size * chunk * (4 * config.hidden_size + 3 * config.intermediate_size)
    return cache_bytes(config, batch_size, num_slots, dtype) + options + scores + activations


def available_bytes(device: jax.Device) -> int:
    """Bytes that can still be allocated on a device (on a CPU: in the machine's memory)."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def require_memory(what: str, needed: int, device: jax.Device, advice: str) -> None:
    """Refuse something that does not fit.

    Raises:
        MemoryBudgetError: `needed` bytes are more than the device has left; both figures are named.
    """
    available = available_bytes(device)
    if needed > available:
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(needed)}, but only {format_bytes(available)} of memory is "
            f"free on {device}: {advice}"
        )


def format_bytes(number: int) -> str:
    """A size in words, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
