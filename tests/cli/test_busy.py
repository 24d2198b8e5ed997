import io
import threading
import types

import jax
import pytest

from ssd_jax.cli import busy as module
from ssd_jax.cli import model_name
from ssd_jax.cli.busy import begin, busy, busy_in_turn
from ssd_jax.cli.compile_clock import showing_compilation

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Timer:
    """A timer that goes off when the test says so."""

    started = ()

    def __init__(self, seconds, action):
        self.seconds, self.action = seconds, action

    def start(self):
        Timer.started = (*Timer.started, self)

    def cancel(self):
        Timer.started = tuple(one for one in Timer.started if one is not self)


@pytest.fixture
def timers(monkeypatch):
    """Lets the time pass of all timers that were started and not cancelled."""
    Timer.started = ()
    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("ssd_jax.cli.busy.terminal_width", lambda: 30)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def go_off():
        for timer in Timer.started:
            timer.action()

    return go_off


def write_to(stream, monkeypatch):
    """Past pytest, which gives a test another `sys.stderr` than its fixtures."""
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stream))


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    write_to(stream, monkeypatch)
    return stream


@pytest.fixture
def file(monkeypatch):
    stream = io.StringIO()
    write_to(stream, monkeypatch)
    return stream


def test_on_a_terminal_the_line_is_dim_and_goes_away(timers, terminal):
    with busy("loading", quiet=False):
        timers()
        assert terminal.getvalue() == "\x1b[2mloading ...\x1b[0m"
    assert terminal.getvalue() == "\x1b[2mloading ...\x1b[0m\r\x1b[K"


def test_elsewhere_it_is_a_line_for_what_takes_long(timers, file):
    with busy("loading", quiet=False):
        assert [timer.seconds for timer in Timer.started] == [module.LINE_DELAY_S]
        timers()
    assert file.getvalue() == "loading ...\n"


def test_quick_work_leaves_no_trace(timers, terminal):
    with busy("loading", quiet=False):
        pass
    timers()
    assert terminal.getvalue() == ""


def test_quiet_is_quiet(timers, terminal):
    with busy("loading", quiet=True):
        timers()
    assert terminal.getvalue() == ""


def test_a_timer_that_was_already_going_off_writes_nothing(timers, terminal):
    end = begin("loading", quiet=False)
    (timer,) = Timer.started
    end()
    timer.action()
    assert terminal.getvalue() == ""


def test_a_long_line_is_cut_so_that_it_can_be_taken_away(timers, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with busy("x" * 100, quiet=False):
        timers()
        assert terminal.getvalue() == "x" * 29


def test_a_terminal_that_cannot_erase_gets_lines(timers, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with busy("loading", quiet=False):
        timers()
    assert terminal.getvalue() == "loading ...\n"


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_is_gone_is_no_fault(timers, monkeypatch, closed):
    stream = io.StringIO()
    stream.close()
    stream.isatty = lambda: False
    write_to(stream if closed else None, monkeypatch)
    with busy("loading", quiet=False):
        timers()


def test_one_text_follows_another(timers, terminal):
    with busy_in_turn(quiet=False) as tell:
        for text in ("one", "two"):
            tell(text)
            timers()
    erase = "\r\x1b[K"
    assert terminal.getvalue() == "".join(
        f"\x1b[2m{text} ...\x1b[0m{erase}" for text in ("one", "two")
    )


def test_compiling_is_shown_until_the_text_comes(timers, terminal):
    def lower():
        jax.monitoring.record_event_time_span(LOWERED, 0.0, 1.0)

    texts = []
    with showing_compilation(texts.append, quiet=False) as write:
        lower()
        timers()
        assert "compiling ..." in terminal.getvalue()
        jax.monitoring.record_event_time_span(COMPILED, 1.0, 2.0)
        assert terminal.getvalue().endswith("\r\x1b[K")
        lower()
        timers()
        write("text")
        assert terminal.getvalue().count("\r\x1b[K") == 2
        lower()
        timers()
    assert texts == ["text"]
    assert terminal.getvalue().count("compiling") == 2
    lower()
    timers()
    assert terminal.getvalue().count("compiling") == 2


def test_a_real_compilation_shows_itself(timers, terminal):
    with showing_compilation(print, quiet=False):
        jax.jit(lambda x: x * 2 + 1)(3.0)
        assert Timer.started == ()


@pytest.mark.parametrize("with_bars", [True, False])
def test_fetching_is_said_where_the_hub_shows_no_bars(timers, monkeypatch, with_bars):
    stream = Terminal() if with_bars else io.StringIO()
    write_to(stream, monkeypatch)
    monkeypatch.setattr(model_name, "sys", types.SimpleNamespace(stderr=stream))

    def fetch(name, *, quiet):
        timers()
        return name

    monkeypatch.setattr(model_name, "model_folder", fetch)
    assert model_name.named_folder("a/b") == "a/b"
    assert stream.getvalue() == (
        "" if with_bars else "fetching a/b from the Hugging Face hub ...\n"
    )
