"""Times of the attention kernels on a GPU beside their peers: same shapes, same run, raw JSON.

    python -m bench.kernel_speed --output kernel_speed.json

Peers: cuDNN through `jax.nn.dot_product_attention`, JAX's `attention_mgpu` (float16 only), tokamax
and torch's SDPA where they can be imported, and a copy on the device, which says what bandwidth
there is. A contender that cannot run a shape is recorded with the reason. Outputs are compared
with the XLA reference before anything is timed; a wrong one gets no time.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.record import environment, write_record
from pallas_kernels import ops, reference

CALLS, REPEATS = 10, 7
# Different roundings of 16-bit weights; a wrong mask or block is off by orders more.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One workload: `tokens` is 0 for a prompt (as many tokens as slots)."""

    op: str
    batch: int
    slots: int
    tokens: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = True

    @property
    def flops(self) -> int:
        """Of the two products, without what a causal mask hides."""
        tokens = self.tokens or self.slots
        hidden = 2 if self.causal and not self.tokens else 1
        return 4 * self.batch * self.heads * tokens * self.slots * self.head_dim // hidden

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values, which a decode step reads once."""
        return 4 * self.batch * self.kv_heads * self.slots * self.head_dim


def prompts(lengths: tuple[int, ...]) -> list[Shape]:
    """Prompts with and without a causal mask, 32 thousand tokens in all."""
    return [
        Shape(op="attention", batch=max(1, 32768 // slots), slots=slots, dtype=dtype, causal=causal)
        for slots in lengths
        for dtype in ("bfloat16", "float16")
        for causal in (False, True)
    ]


def steps(lengths: tuple[int, ...], batches: tuple[int, ...]) -> list[Shape]:
    """Decoding, verification of 8 tokens and trees of 32 nodes over long caches."""
    return [
        Shape(op=op, batch=batch, slots=slots, tokens=tokens)
        for slots in lengths
        for batch in batches
        for op, tokens in (
            ("decode_attention", 1),
            ("verify_attention", 8),
            ("ancestor_attention", 32),
        )
    ]


def draw(shape: Shape, seed: int = 0) -> tuple[jax.Array, ...]:
    """The arguments of the shape's op, from a seed."""
    keys = jax.random.split(jax.random.key(seed), 3)
    dtype = jnp.dtype(shape.dtype)
    batch, heads, kv_heads, width = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    normal = functools.partial(jax.random.normal, dtype=dtype)
    if shape.op == "attention":
        in_keys = (batch, shape.slots, kv_heads, width)
        in_query = (batch, shape.slots, heads, width)
        return tuple(map(normal, keys, (in_query, in_keys, in_keys)))
    cache = (batch, kv_heads, shape.slots, width)
    stored = (normal(keys[1], cache), normal(keys[2], cache))
    full = jnp.full((batch,), shape.slots, jnp.int32)
    if shape.op == "decode_attention":
        return normal(keys[0], (batch, heads, width)), *stored, full
    query = normal(keys[0], (batch, shape.tokens, heads, width))
    if shape.op == "verify_attention":
        return query, *stored, full - shape.tokens
    nodes = np.arange(shape.tokens)
    # A chain: node t sees nodes 0 .. t. Which bits are set does not change the time.
    words = ((2 << nodes.astype(np.uint64)) - 1).astype(np.uint32)
    ancestors = np.stack([words, np.zeros_like(words)], axis=-1)
    repeated = jnp.broadcast_to(jnp.asarray(ancestors), (batch, shape.tokens, 2))
    return query, *stored, full - shape.tokens, repeated


def contenders(shape: Shape) -> dict[str, Callable[..., jax.Array]]:
    """What can be tried on a shape: ours first."""
    if shape.op != "attention":
        return {"ours": jax.jit(getattr(ops, shape.op))}
    causal, scale = shape.causal, shape.head_dim**-0.5

    def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    def by_mgpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
        if q.dtype != jnp.float16:
            raise NotImplementedError("attention_mgpu computes float16 only")
        config = module.TuningConfig(
            block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal
        )
        return module.attention(q, k, v, config)

    def by_tokamax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        tokamax = importlib.import_module("tokamax")
        return tokamax.dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    found = {
        "ours": lambda q, k, v: ops.attention(q, k, v, causal=causal),
        "cudnn": by_cudnn,
        "attention_mgpu": by_mgpu,
    }
    if importlib.util.find_spec("tokamax") is not None:
        found["tokamax"] = by_tokamax
    return {name: jax.jit(function) for name, function in found.items()}


def expected(shape: Shape, arguments: tuple[jax.Array, ...]) -> jax.Array:
    """The reference's output for the last tokens of the first sequence, which see the most."""
    options = {"scale": shape.head_dim**-0.5}
    if shape.op != "attention":
        first = tuple(x[:1] for x in arguments)
        return getattr(reference, shape.op)(*first, **options)
    query, key, value = (x[:1] for x in arguments)
    start = jnp.full((1,), shape.slots - 64, jnp.int32)
    more = {"causal": shape.causal, "soft_cap": None, "window": None}
    return reference.attention(query[:, -64:], key, value, None, start, **more, **options)[0]


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> list[float]:
    """Seconds of one call, by runs of calls that are only waited for at their end."""
    wait(call())
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        result = None
        for _ in range(CALLS):
            result = call()
        wait(result)
        times.append((time.perf_counter() - begin) / CALLS)
    return times


def figures(shape: Shape, times: list[float]) -> dict[str, object]:
    """Times and the rates that follow from their median."""
    median = statistics.median(times)
    return {
        "seconds": times,
        "median_us": median * 1e6,
        "tflops": shape.flops / median / 1e12,
        "cache_gb_per_s": shape.cache_bytes / median / 1e9,
    }


def measure(shape: Shape, copy_gb_per_s: float) -> dict[str, object]:
    """All contenders on one shape."""
    arguments = draw(shape)
    want = np.asarray(expected(shape, arguments).astype(jnp.float32))
    found: dict[str, object] = {}
    for name, function in contenders(shape).items():
        try:
            got = function(*arguments)[:1]
            got = got[:, -64:] if shape.op == "attention" else got
            error = float(np.sqrt(np.mean((np.asarray(got, np.float32) - want) ** 2)))
            error /= float(np.sqrt(np.mean(want**2)))
            if not error <= TOLERANCE:
                found[name] = {"wrong": error}
                continue
            call = functools.partial(function, *arguments)
            times = seconds(call, jax.block_until_ready)
            found[name] = {"relative_rms": error, **figures(shape, times)}
        except Exception as reason:  # a peer's refusal is a result like any other
            found[name] = {"refused": f"{type(reason).__name__}: {reason}"[:300]}
    if shape.op == "attention" and importlib.util.find_spec("torch") is not None:
        found["torch_sdpa"] = by_torch(shape)
    return {
        "shape": dataclasses.asdict(shape),
        "copy_gb_per_s": copy_gb_per_s,
        "results": found,
    }


def by_torch(shape: Shape) -> dict[str, object]:
    """Torch's scaled_dot_product_attention on arrays of the same shape."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"refused": "torch sees no GPU"}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    kind = getattr(torch, shape.dtype)
    sizes = [
        (shape.batch, heads, shape.slots, shape.head_dim)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    arrays = [torch.randn(size, device="cuda", dtype=kind) for size in sizes]
    call = functools.partial(sdpa, *arrays, is_causal=shape.causal, enable_gqa=True)
    times = seconds(call, lambda _: torch.cuda.synchronize())
    return figures(shape, times)


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """Gigabytes per second that a copy on the device reads and writes."""
    source = jnp.zeros((int(gigabytes * 1e9) // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = seconds(functools.partial(copy, source), jax.block_until_ready)
    return 2 * source.nbytes / statistics.median(times) / 1e9


def main() -> None:
    """Time attention on this machine's GPU and write a record."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, help="file of the record; without it, stdout")
    parser.add_argument(
        "--prompt-slots", type=int, nargs="*", default=[8192, 32768], help="prompt lengths"
    )
    parser.add_argument(
        "--cache-slots", type=int, nargs="*", default=[8192, 32768, 131072], help="cache lengths"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16], help="of decoding")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"times are taken on a GPU, and JAX runs on {jax.default_backend()} here")
    bandwidth = copy_bandwidth()
    shapes = prompts(tuple(arguments.prompt_slots))
    shapes += steps(tuple(arguments.cache_slots), tuple(arguments.batches))
    rows = []
    for shape in shapes:
        rows.append(measure(shape, bandwidth))
        results = rows[-1]["results"]
        print(shape.op, shape.batch, shape.slots, shape.dtype, shape.causal, results, flush=True)
    write_record({"environment": environment(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
