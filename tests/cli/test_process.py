"""What only a process of its own shows: imports, pipes, signals, the cache on disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from ssd_jax.cli.main import main
sys.exit(main())
"""
HELP = """
import sys
from ssd_jax.cli.main import main
for argv in (["--help"], ["generate", "--help"], ["chat", "--help"], ["--version"]):
    assert main(argv) == 0
assert main(["generate", "x", "--top-p", "0"]) == 2
assert "jax" not in sys.modules and "numpy" not in sys.modules
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def start(cache):
    """Starts `ssd-jax` with pipes."""

    def start(*argv, code=MAIN):
        environment = {name: v for name, v in os.environ.items() if not name.startswith("SSD_JAX_")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "SSD_JAX_COMPILATION_CACHE": str(cache),
        }
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )

    return start


def test_help_and_usage_errors_do_not_import_jax(start):
    process = start(code=HELP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    for words in (b"generate", b"--max-tokens", b"[SSD_JAX_TOP_K]", b"(default: 256"):
        assert words in out


@pytest.fixture
def start_long(start, tiny_checkpoint):
    """Starts a text that takes many seconds."""
    argv = ("generate", "the", "--model", tiny_checkpoint, "--ignore-eos", "--max-tokens", "16000")
    return lambda *more: start(*argv, *more)


def test_a_reader_that_goes_away_ends_it_quietly(start_long, cache):
    process = start_long("--quiet")
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert any(cache.iterdir())


def test_an_interrupt_keeps_the_text_and_shows_no_traceback(start_long, generate):
    text = generate("the", "--quiet").out.encode()
    process = start_long()
    first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first == text[:5]
    assert rest.endswith(b"\n")
    assert err.endswith(b"interrupted\n")
    assert b"Traceback" not in err
