"""What only a process of its own shows: imports, pipes, signals, the cache on disk."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from ssd_jax.cli.main import main
sys.exit(main())
"""
# Python's own start, before which nobody can catch anything, is kept out by blocking the signal.
FROM_ENTRY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from ssd_jax.cli.entry import catch_interrupts, run
catch_interrupts()
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
sys.exit(run())
"""
AS_MODULE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("ssd_jax", run_name="__main__", alter_sys=True)
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

    def start(*argv, code=MAIN, **options):
        environment = {name: v for name, v in os.environ.items() if not name.startswith("SSD_JAX_")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "SSD_JAX_COMPILATION_CACHE": str(cache),
        }
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(os.fsencode, map(str, argv))],
            env=environment | options.pop("variables", {}),
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
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
    return lambda *more, **options: start(*argv, *more, **options)


def test_a_reader_that_goes_away_ends_it_quietly(start_long, cache):
    process = start_long("--quiet")
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert any(cache.iterdir())


@pytest.mark.parametrize("code", [MAIN, AS_MODULE])
def test_an_interrupt_keeps_the_text_and_shows_no_traceback(start_long, generate, code):
    text = generate("the", "--quiet").out.encode()
    process = start_long(code=code)
    first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first == text[:5]
    assert rest.endswith(b"\n")
    assert err.endswith(b"interrupted\n")
    assert b"Traceback" not in err


def check_interrupt(start_long, seconds):
    """Interrupt a run after so many seconds, most of which it spends importing and compiling."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the process inherits
    try:
        process = start_long("--quiet", code=FROM_ENTRY, stdout=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, (seconds, err)
    assert err == b"" or (err.count(b"\n") == 1 and err.endswith(b"interrupted\n")), seconds


@pytest.mark.parametrize("seconds", [0, 0.3, 0.7, 1.5, 2.5])
def test_an_interrupt_while_starting_is_quiet(start_long, seconds):
    check_interrupt(start_long, seconds)


@pytest.mark.slow
def test_an_interrupt_at_any_moment_is_quiet(start_long):
    moments = random.Random(0)
    for _ in range(40):
        check_interrupt(start_long, moments.uniform(0, 3))


def without_stream(number):
    """Code that starts the command as a shell's `N>&-` does."""
    return f"""
import os, sys
if os.fstat({number}):
    os.close({number})
    code = "from ssd_jax.cli.entry import run; import sys; sys.exit(run())"
    os.execv(sys.executable, [sys.executable, "-c", code, *sys.argv[1:]])
"""


def outcome_of(process):
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in err, err
    return process.returncode, out, err


def test_closed_streams(start):
    version = outcome_of(start("--version"))
    assert version[0] == 0
    for number in (0, 2):
        assert outcome_of(start("--version", code=without_stream(number))) == version
    wrong = "generate", "x", "--top-p", "0"
    assert outcome_of(start(*wrong, code=without_stream(2))) == (2, b"", b"")
    code, out, err = outcome_of(start(*wrong, code=without_stream(1)))
    assert (code, out) == (2, b"")
    assert b"Standard output is closed" in err


def test_a_prompt_from_a_closed_stdin_is_empty(start, tiny_checkpoint):
    process = start("generate", "-", "--model", tiny_checkpoint, code=without_stream(0))
    code, _, err = outcome_of(process)
    assert (code, err.count(b"\n")) == (2, 1)
    assert b"empty" in err


def test_errors_without_a_listener_are_errors_all_the_same(start):
    wrong = "generate", "x", "--top-p", "0"
    with open("/dev/full", "wb") as full:
        process = start(*wrong, stderr=full)
        assert (process.wait(60), process.stdout.read()) == (2, b"")
        process.stdout.close()
    process = start(*wrong)
    process.stderr.close()
    assert process.wait(60) == 2
    process.stdout.close()


COERCED = {"LC_ALL": "C"}
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "locale", [ASCII, *(pytest.param(each, marks=pytest.mark.slow) for each in ({}, COERCED))]
)
def test_text_that_is_not_utf8_is_a_sentence(start, tiny_checkpoint, tmp_path, locale):
    model = "--model", tiny_checkpoint
    (tmp_path / "prompt").write_bytes(b"th\xffe")
    for prompt in ("th\udcffe", "-"):
        with (tmp_path / "prompt").open("rb") as file:
            process = start("generate", prompt, *model, variables=locale, stdin=file)
        code, _, err = outcome_of(process)
        assert (code, err.count(b"\n")) == (2, 1)
    code, _, err = outcome_of(start("inspect", "/no\udcffwhere", variables=locale))
    assert (code, err.count(b"\n")) == (2, 1)
