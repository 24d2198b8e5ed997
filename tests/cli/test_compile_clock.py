import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from ssd_jax.cli.compile_clock import CompileClock

COUNTED = "/jax/core/compile/jaxpr_trace_duration"
SPANS = st.lists(
    st.tuples(st.sampled_from([COUNTED, "/something/else"]), st.integers(1, 40), st.integers(0, 9))
)


@given(SPANS)
def test_seconds_covered_by_several_spans_count_once(spans):
    covered = set()
    with CompileClock() as clock:
        for event, start, length in spans:
            jax.monitoring.record_event_time_span(event, float(start), float(start + length))
            if event == COUNTED:
                covered |= set(range(start, start + length))
        assert clock.seconds == len(covered)


def test_a_program_counts_when_it_is_made_and_not_when_it_runs():
    program = jax.jit(lambda x: jnp.sin(x) * 3)
    argument = jnp.ones(7)
    with CompileClock() as clock:
        program(argument)
        made = clock.seconds
        program(argument)
        assert clock.seconds == made > 0
    jax.jit(lambda x: x - 5)(argument)
    assert clock.seconds == made
