"""The process that renders templates: kept, replaced after a failure, never left behind."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from ssd_jax.errors import RequestError
from ssd_jax.text import chat_template, render_chat
from ssd_jax.text.template_process import TemplateProcess

SAY = "{{ messages[0].content }}"
ENDLESS = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
HUGE = "{{ messages[0].content.center(6 * 10**8) | length }}"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="it is looked at by signals and forks")


@pytest.fixture
def process():
    process = TemplateProcess()
    yield process
    process.close()


def render(process, template, content="Hi"):
    messages = [{"role": "user", "content": content}]
    return render_chat(template, messages, special_tokens={}, process=process)


def workers():
    """Ids of the template processes of this process."""
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and any("template_worker" in part for part in child.cmdline())
    }


def is_gone(process_id, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process_id):
            return True
        if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
            return True  # nobody waits for it in a container
        time.sleep(0.05)
    return False


def test_one_process_renders_all_and_ends_with_its_holder():
    process = TemplateProcess()
    assert workers() == set(), "it starts when it is needed"
    assert render(process, SAY) == "Hi"
    (first,) = workers()
    assert render(process, SAY, "line\n\u2028two") == "line\n\u2028two"
    for broken in ("{% if %}", "{{ 1 // 0 }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(RequestError):
            render(process, broken)
    assert workers() == {first}
    assert os.getsid(first) != os.getsid(0), "the terminal's Ctrl-C must not reach it"
    del process
    gc.collect()
    assert workers() == set()


def test_nothing_stays_of_the_rendering_before(process):
    setting = "{% set seen = 'before' %}{% macro old() %}{% endmacro %}{{ seen }}"
    assert render(process, setting) == "before"
    asking = "{{ seen is defined }}{{ old is defined }}"
    assert render(process, asking) == "FalseFalse"


def test_it_is_replaced_after_a_timeout(process, monkeypatch):
    assert render(process, SAY) == "Hi"
    (first,) = workers()
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    with pytest.raises(RequestError, match=r"took more than 0\.5 seconds"):
        render(process, ENDLESS)
    monkeypatch.undo()
    assert render(process, SAY, "again") == "again"
    assert first not in workers()


def test_it_is_replaced_after_a_crash(process):
    assert render(process, SAY) == "Hi"
    (first,) = workers()
    os.kill(first, signal.SIGKILL)
    assert is_gone(first)
    assert render(process, SAY, "again") == "again"


def test_every_rendering_has_the_same_room(process):
    """Two of them together would exceed the limit."""
    for _ in range(2):
        assert render(process, HUGE) == str(6 * 10**8)
    with pytest.raises(RequestError, match="memory"):
        render(process, HUGE.replace("6", "11"))
    assert render(process, HUGE) == str(6 * 10**8)


@pytest.fixture
def interruptible():
    """Ctrl-C is answered; a test run in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_rendering_answers_nothing_else(process):
    assert render(process, SAY) == "Hi"
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render(process, ENDLESS)
    timer.join()
    assert render(process, SAY, "again") == "again"


def test_threads_take_turns(process):
    texts = [f"text {index}" for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: render(process, SAY, text), texts)) == texts
    assert len(workers()) == 1


def test_a_tokenizer_keeps_its_process():
    from tiny_models import tiny_tokenizer  # with JAX, which the process that forks must not have

    tokenizer = dataclasses.replace(
        tiny_tokenizer(), chat_template=SAY, template_process=TemplateProcess()
    )
    first, second = (tokenizer.encode_chat([{"role": "user", "content": text}]) for text in "ab")
    assert (tokenizer.decode(first), tokenizer.decode(second)) == ("a", "b")
    assert len(workers()) == 1
    tokenizer.template_process.close()
    assert workers() == set()


FORKING = """
import os, sys, time
from ssd_jax.text.template_process import TemplateProcess
from test_template_process import SAY, render, workers
process = TemplateProcess()
assert render(process, SAY) == "Hi"
(own,) = workers()
child = os.fork()
if child == 0:
    assert render(process, SAY, "child") == "child"
    os._exit(0 if workers() and own not in workers() else 1)
assert os.waitpid(child, 0)[1] == 0
assert render(process, SAY, "parent") == "parent" and workers() == {own}
child = os.fork()  # it holds our end of the pipe, and lives on
if child == 0:
    time.sleep(60)
    os._exit(0)
print(own, child, flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_process_that_was_killed_and_a_fork_has_its_own():
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as holder:
        line = holder.stdout.readline().split()
        holder.kill()
        assert len(line) == 2
    worker, child = map(int, line)
    try:
        assert is_gone(worker)
    finally:
        os.kill(child, signal.SIGKILL)
