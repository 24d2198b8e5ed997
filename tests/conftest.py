"""Settings for every test, made before JAX starts: CPU, full precision, no implicit conversions."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import random
import time

import hypothesis
import jax
import pytest

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
START = pytest.StashKey[float]()

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for a share of the slow tests that differs from run to run."""
    group = parser.getgroup("ssd-jax")
    group.addoption("--minutes", type=float, help="begin no test after this many minutes: skip it")
    group.addoption("--shuffle", metavar="SEED", help="modules, and tests in them, in this order")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are kept in pytest's own cache folder, so that a rerun is faster."""
    config.stash[START] = time.monotonic()
    cache = getattr(config, "cache", None)  # absent under `-p no:cacheprovider`
    if cache is not None:
        # JAX writes entries in place, so processes that share a folder would read halves of them.
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir(f"jax_programs{worker}")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle whole modules, so that each is still compiled for once."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        modules: dict[str, list[pytest.Item]] = {}
        for item in items:
            modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
        order = random.Random(seed)
        shuffled = order.sample(list(modules.values()), len(modules))
        items[:] = [item for module in shuffled for item in order.sample(module, len(module))]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin after the minutes of this run."""
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - item.config.stash[START] > 60 * minutes:
        pytest.skip(f"this run's {minutes:g} minutes are spent")


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
