"""What a request will take and what the device has, compared before anything is allocated."""

import jax
import jax.numpy as jnp
import psutil
from jaxtyping import DTypeLike

from ssd_jax.config import ModelConfig
from ssd_jax.containers import container_free_bytes
from ssd_jax.errors import MemoryBudgetError


def params_bytes(config: ModelConfig, dtype: DTypeLike, *, own_output: bool = False) -> int:
    """Bytes of a model's weights; with `own_output` a tied output matrix is stored as well."""
    count = config.num_params
    if own_output and config.tied_embeddings:
        count += config.vocab_size * config.hidden_size
    return count * jnp.dtype(dtype).itemsize


def available_bytes(device: jax.Device) -> int:
    """Bytes that can still be allocated on a device.

    On a CPU: in the machine's memory, or in what the container leaves of it.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = psutil.virtual_memory().available
    limit = container_free_bytes()
    return free if limit is None else min(free, limit)


def require_memory(
    what: str, needed: int, device: jax.Device, advice: str, parts: str | None = None
) -> None:
    """Refuse something that does not fit; `parts` says what it needs the memory for.

    Raises:
        MemoryBudgetError: `needed` bytes are more than the device has left; both figures are named.
    """
    available = available_bytes(device)
    if needed > available:
        details = "" if parts is None else f" ({parts})"
        raise MemoryBudgetError(
            f"{what} needs {format_bytes(needed)}{details}, but only {format_bytes(available)} of "
            f"memory is free on {device}: {advice}"
        )


def format_bytes(number: int) -> str:
    """A size in words, in binary units."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
