"""Settings for every test, made before JAX starts: CPU, full precision, no implicit conversions."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "ssd_jax",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ssd_jax")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept in pytest's own cache folder, so that a rerun is faster."""
    cache = getattr(config, "cache", None)  # absent under `-p no:cacheprovider`
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax_programs")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop a module's programs after it: thousands in one process exhaust its memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def compilations():
    """Names of the compilations so far, filled as they happen."""
    seen = []

    def listen(event, duration, **details):
        if event == COMPILE_EVENT:
            seen.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
