"""Times of the attention kernels beside their peers and beside a copy, on one device."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from bench import kernel_speed
from bench.first_light.profiles import describe, kernels_of
from bench.kernel_speed import Shape

_DIFFERENT = 512e6  # bytes of caches that are read in turn, so that none stays in the L2 cache
_MOST_CALLS, _REPEATS = 16, 7
_RUNS = 10  # dispatched before the host waits, which takes as long as several short kernels
# Goals on Hopper.
FORWARD_GOAL, CACHE_GOAL = 1.0, 0.85

type Tell = Callable[..., None]


def forward(*, tell: Tell, dry_run: bool, slots: int, batch: int) -> None:
    """A prompt's attention by every contender that is there."""
    copy = _copy(dry_run)
    for causal in (False, True):
        shape = Shape(
            op="attention",
            batch=batch,
            slots=slots,
            heads=4 if dry_run else 16,
            kv_heads=4 if dry_run else 16,
            causal=causal,
        )
        found: dict[str, Any] = kernel_speed.measure(shape, copy)["results"]  # pyright: ignore[reportAssignmentType]
        ours, cudnn = (found.get(name, {}).get("median_us") for name in ("ours", "cudnn"))
        parts = [f"{name} {_forward_figure(result)}" for name, result in found.items()]
        ratio = cudnn / ours if ours and cudnn else None
        if ratio is not None:
            parts.append(f"ours {ratio:.2f}x cuDNN (goal {FORWARD_GOAL})")
        what = f"B{batch} S{slots} {'causal' if causal else 'full'}"
        tell(what, "; ".join(parts), ok="wrong" not in found["ours"], results=found, ratio=ratio)


def _forward_figure(result: dict[str, Any]) -> str:
    if "tflops" in result:
        return f"{result['tflops']:.0f} TFLOP/s ({result['median_us']:.0f} us)"
    return f"wrong by {result['wrong']:.2g}" if "wrong" in result else "refused"


def caches(
    *, tell: Tell, dry_run: bool, slots: int, batches: list[int], with_parts: bool = False
) -> None:
    """Decoding, verification and trees over full caches, as a share of what a copy moves.

    `with_parts` also lists the kernels of each op.
    """
    copy = _copy(dry_run)
    tell("copy", f"{copy:.0f} GB/s read and written")
    for batch in batches:
        for shape in kernel_speed.steps((slots,), (batch,)):
            seconds, parts = _seconds_a_call(shape, with_parts=with_parts)
            rate = shape.cache_bytes / seconds / 1e9
            tell(
                f"{shape.op} B{batch} S{slots} T{shape.tokens}",
                f"{seconds * 1e6:.1f} us, {rate:.0f} GB/s, {rate / copy:.0%} of a copy (goal "
                f"{CACHE_GOAL:.0%})",
                seconds=seconds,
                gb_per_s=rate,
                share=rate / copy,
            )
            if parts:
                tell(f"{shape.op} B{batch} S{slots}", f"of which {parts}")


def _seconds_a_call(shape: Shape, *, with_parts: bool) -> tuple[float, str]:
    """Seconds of one call, of many in one program, each over a cache of its own, and its kernels.

    One dispatch takes longer than a short kernel, so that calls one by one would time the host.
    """
    calls = int(min(_MOST_CALLS, max(2, _DIFFERENT // shape.cache_bytes)))
    sets = [kernel_speed.draw(shape, seed) for seed in range(calls)]
    op = kernel_speed.contenders(shape)["ours"]

    @jax.jit
    def all_calls(sets: Any) -> Any:  # noqa: ANN401
        return [op(*arguments) for arguments in sets]

    run = functools.partial(all_calls, sets)
    jax.block_until_ready(run())
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready([run() for _ in range(_RUNS)][-1])
        times.append((time.perf_counter() - started) / _RUNS / calls)
    return statistics.median(times), describe(kernels_of(run), calls) if with_parts else ""


def _copy(dry_run: bool) -> float:
    """Gigabytes a second that a copy on the device reads and writes."""
    return kernel_speed.copy_bandwidth(0.001 if dry_run else 2.0)
