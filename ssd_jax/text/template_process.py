"""The process in which chat templates run, kept from one rendering to the next.

Starting a Python with jinja2 takes a tenth of a second, rendering a millisecond. The process is
started by the first rendering and ended, to be started anew by the next, when a rendering fails in
a way that may have left something behind: too long, too large, crashed, interrupted.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from ssd_jax.errors import RequestError

_PROGRAM = Path(__file__).with_name("template_worker.py")


@dataclasses.dataclass(slots=True)
class _Worker:
    """A running `template_worker.py`, and the file that its stderr goes to."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]


@dataclasses.dataclass(slots=True)
class _Own:
    """What one process of ours has: a lock for its threads, and its worker once it has one."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    worker: _Worker | None = None


class TemplateProcess:
    """A process that answers one rendering after the other; threads take turns.

    It ends with this object, and with the process that holds it: its stdin is closed then. It does
    not see the terminal's Ctrl-C. A fork gets a process of its own.
    """

    def __init__(self) -> None:
        # By process id: in a fork, the lock may be held by a thread that is not there.
        self._own: dict[int, _Own] = {}
        weakref.finalize(self, _end_all, self._own)

    def __reduce__(self) -> tuple[type["TemplateProcess"], tuple[()]]:
        """A copy, here or in another process, starts a process of its own."""
        return TemplateProcess, ()

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        _end_all(self._own)

    def ask(self, request: str, seconds: float) -> dict[str, Any]:
        """The worker's answer to a request of one line, or {"kind", "reason"} if it gave none.

        Raises:
            RequestError: the process cannot be started.
        """
        own = self._own.setdefault(os.getpid(), _Own())
        with own.lock:
            if own.worker is None or own.worker.process.poll() is not None:
                _end(own)
                own.worker = _start()
            try:
                answer = _exchange(own.worker, request, seconds)
            except BaseException:  # Ctrl-C: the answer to come would be taken for the next one's
                _end(own)
                raise
            if answer.pop("ended", False):
                _end(own)
            return answer


def _start() -> _Worker:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (it is closed with the process)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],  # -P: else its folder could hide other modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    except OSError as error:
        errors.close()
        raise RequestError(
            f"Expected to run {sys.executable} for the chat template, but that failed ({error}); "
            "check this Python."
        ) from error
    return _Worker(process=process, errors=errors)


def _exchange(worker: _Worker, request: str, seconds: float) -> dict[str, Any]:
    """What the worker answers; "ended" says that it is of no further use."""
    process = worker.process
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("The worker was started with pipes.")
    timed_out = threading.Event()

    def give_up() -> None:
        timed_out.set()
        process.kill()

    line = b""
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # it ended without reading
        pass
    finally:
        timer.cancel()
        timer.join()
    if line.endswith(b"\n"):
        answer = json.loads(line)
        return {**answer, "ended": answer.get("ended", False) or timed_out.is_set()}
    if timed_out.is_set():
        return {"kind": "failed", "reason": f"it took more than {seconds} seconds", "ended": True}
    process.wait()
    worker.errors.seek(0)
    last_line = worker.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    reason = last_line or f"its process ended: {process.returncode}"
    return {"kind": "failed", "reason": reason, "ended": True}


def _end(own: _Own) -> None:
    """Kill and reap the worker, if there is one."""
    worker, own.worker = own.worker, None
    if worker is not None:
        worker.process.kill()
        worker.process.wait()
        _close(worker)


def _end_all(everyone: dict[int, _Own]) -> None:
    """End what is this process's own, and let go of what a fork inherited."""
    for process_id in list(everyone):
        own = everyone.pop(process_id)
        if process_id == os.getpid():
            _end(own)
        elif own.worker is not None:
            own.worker.process.returncode = 0  # not ours to wait for
            _close(own.worker)


def _close(worker: _Worker) -> None:
    for pipe in (worker.process.stdin, worker.process.stdout, worker.errors):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was written to nobody
                pipe.close()
