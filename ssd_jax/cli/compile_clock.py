"""How long JAX spends on making programs rather than running them."""

from types import TracebackType

import jax

_EVENTS = frozenset(
    {
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",  # or its retrieval from the persistent cache
    }
)


class CompileClock:
    """Counts, while it is entered, the seconds in which a program was traced, lowered or compiled.

    Traces nest (a jitted function within another one); the time they share is counted once.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_time_span_listener(self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._record)

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        total, counted_to = 0.0, 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, counted_to))
            counted_to = max(counted_to, end)
        return total

    def _record(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        if event in _EVENTS:
            self._spans.append((start_time, end_time))
