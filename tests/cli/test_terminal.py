"""`ssd-jax chat` on a terminal of its own, as somebody would type."""

import contextlib
import os
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
MAIN = """
import os, signal, sys
os.login_tty(os.dup(0))  # so that Ctrl-C is a signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ssd_jax.cli.main import main
sys.exit(main())
"""
PROMPT = "\x1b[?2004h"  # the editor asks the terminal to mark what is pasted
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PASTE = "\x1b[200~the cat\nsat on the mat\x1b[201~"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def chat(tiny_checkpoint, chat_checkpoint, tmp_path):
    """`say(keys, until)` types into a running chat, and gives what is shown until then."""
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").symlink_to(chat_checkpoint / "chat_template.jinja")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSD_JAX_")} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "SSD_JAX_COMPILATION_CACHE": jax.config.jax_compilation_cache_dir or "off",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm",
    }
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 60))
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "chat", "-m", str(tmp_path), "--ignore-eos"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)

    def say(keys, until):
        os.write(ours, keys.encode())
        shown, end = "", time.monotonic() + 60
        while not (until in shown + ESCAPES.sub("", shown) if until else len(shown) > 80):
            assert select.select([ours], [], [], end - time.monotonic())[0], shown
            with contextlib.suppress(OSError):  # the other end is closed
                if piece := os.read(ours, 4096).decode(errors="replace"):
                    shown += piece
                    continue
            break
        return ESCAPES.sub("", shown)

    yield process, say
    process.kill()
    process.wait()
    os.close(ours)


def test_pasting_interrupting_and_leaving(chat, tmp_path):
    process, say = chat
    assert "/help lists the commands" in say("", PROMPT)
    say(f"{PASTE}\r", "\x1b[?2004l")
    say("", None)
    assert "interrupted" in say(CTRL_C, PROMPT)
    file = tmp_path / "talk.json"
    assert "2 messages saved" in say(f"/save {file}\r", PROMPT)
    assert '"the cat\\nsat on the mat"' in file.read_text()
    assert "There is no command '/bla'" in say("/bla\r", PROMPT)
    say(UP, "/bla")
    say(CTRL_C, "\x1b[?25h")  # drawn anew
    assert "Ctrl-D or /exit leaves" in say(CTRL_C, PROMPT)
    say(CTRL_D, "what never comes")
    assert process.wait(timeout=60) == 0
