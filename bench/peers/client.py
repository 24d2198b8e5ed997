"""A peer's process, as the harness sees it."""

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bench.peers.protocol import Answer, Load, Loaded, Run
from ssd_jax.errors import SsdJaxError

REPOSITORY = Path(__file__).resolve().parents[2]
LAST_LINES = 4  # of a peer's own output that an error quotes


class PeerError(SsdJaxError):
    """A peer that is absent, ended, or cannot do what it was asked."""


class Peer:
    """A process that speaks `protocol`; a context manager that ends it.

    `log` is the file that takes what the engine prints.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        seconds: float = 900.0,
    ) -> None:
        self.name = name
        self._seconds = seconds
        self._log = log
        self._buffer = b""
        variables = {**repository_environment(), **(environment or {})}
        try:
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=variables,
                )
        except OSError as error:
            raise PeerError(
                f"{name} should be started by {command[0]}, which failed ({error.strerror}): name "
                "another program."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def load(self, request: Load) -> Loaded:
        """What the peer says of itself once its models are loaded."""
        return Loaded(**self._ask({"op": "load", **dataclasses.asdict(request)}))

    def run(self, request: Run) -> Answer:
        """One answer."""
        return Answer(**self._ask({"op": "run", **dataclasses.asdict(request)}))

    def close(self) -> None:
        """End the process, gently first."""
        stdin, stdout = self._pipes()
        with contextlib.suppress(BrokenPipeError):  # it may be gone already
            stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, _ = self._pipes()
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        reply = json.loads(self._line())
        if "error" in reply:
            raise PeerError(f"{self.name} failed: {reply['error']}")
        return reply

    def _line(self) -> bytes:
        """The next line that the process writes."""
        _, stdout = self._pipes()
        end = time.monotonic() + self._seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._process.kill()
                raise PeerError(f"{self.name} gave no answer within {self._seconds:.0f} s.")
            piece = os.read(stdout.fileno(), 1 << 16)
            if not piece:
                raise self._ended()
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _ended(self) -> PeerError:
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " / ".join(lines[-LAST_LINES:]) or "it printed nothing"
        return PeerError(f"{self.name} ended with code {code} instead of answering: {said}")

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise PeerError(f"{self.name} has no pipes.")
        return stdin, stdout


def repository_environment() -> dict[str, str]:
    """The environment variables under which any Python finds this folder's modules."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def module_command(python: str | Path | None, module: str, *arguments: str) -> list[str]:
    """How a module of this folder is run by an environment's Python; None is the running one."""
    return [str(python or sys.executable), "-m", f"bench.peers.{module}", *arguments]
