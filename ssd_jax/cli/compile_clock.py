"""How long JAX spends on making programs rather than running them, and that it does."""

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

import jax

from ssd_jax.cli.busy import begin

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"  # or fetched from the persistent cache
_EVENTS = frozenset({"/jax/core/compile/jaxpr_trace_duration", _LOWERED, _COMPILED})


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


@contextlib.contextmanager
def showing_compilation(
    write: Callable[[str], None], *, quiet: bool
) -> Iterator[Callable[[str], None]]:
    """`write`, until whose first call it is shown on stderr when a program is being compiled.

    After that the line belongs to the text.
    """
    end: Callable[[], None] | None = None
    settled = quiet

    def listen(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        """An event is told when it is over: what was lowered is compiled next."""
        nonlocal end
        if event in (_LOWERED, _COMPILED) and end is not None:
            end()
            end = None
        if event == _LOWERED and not settled:
            end = begin("compiling", quiet=quiet)

    def settle() -> None:
        nonlocal settled
        settled = True
        if end is not None:
            end()

    def write_text(text: str) -> None:
        settle()
        write(text)

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield write_text
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)
        settle()
