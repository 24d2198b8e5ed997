"""What a dispatch and a transfer cost, and whether two programs of one device overlap."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_REPEATS = 200

type Tell = Callable[..., None]


def measure(*, tell: Tell, dry_run: bool) -> None:
    """Microseconds of the host's and of the devices' small steps."""
    repeats = 20 if dry_run else _REPEATS
    size, few = (64, 8) if dry_run else (4096, 132 * 4)
    here, cpu = jax.devices()[0], jax.devices("cpu")[-1]
    small = jax.device_put(np.zeros((1, 8), np.int32), here)
    add = jax.jit(lambda x: x + 1)

    def told(what: str, run: Callable[[], Any]) -> None:
        seconds = _median(run, repeats)
        tell(what, f"{seconds * 1e6:.1f} us", seconds=seconds)

    told("a small program, waited for", lambda: jax.block_until_ready(add(small)))
    told("a small array to the host", lambda: np.asarray(add(small)))
    told(
        "to the CPU device and back",
        lambda: jax.block_until_ready(jax.device_put(jax.device_put(add(small), cpu), here)),
    )
    many = [jax.device_put(np.zeros(8, np.float32), here) for _ in range(100)]
    first = jax.jit(lambda *arrays: arrays[0])
    told("a program of 100 arrays, dispatched and waited for", lambda: first(*many)[0])
    # A product that fills a small part of the chip leaves room for another, if they may overlap.
    tall, wide = jnp.ones((few, size), jnp.bfloat16), jnp.ones((size, size), jnp.bfloat16)

    def chain(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(20):
            x = (x @ y * jnp.bfloat16(1e-4)).astype(jnp.bfloat16)
        return x

    one, two = jax.jit(chain), jax.jit(lambda x, y: chain(x, y) + jnp.bfloat16(1))
    alone = _median(lambda: jax.block_until_ready(one(tall, wide)), max(3, repeats // 10))
    both = _median(
        lambda: jax.block_until_ready((one(tall, wide), two(tall, wide))), max(3, repeats // 10)
    )
    tell(
        "two programs dispatched together",
        f"{both / alone:.2f}x one alone (1: they overlap, 2: one after the other)",
        ratio=both / alone,
    )


def _median(run: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
