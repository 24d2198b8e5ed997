"""llama.cpp as a peer: its `llama-server`, a process a mode, asked over HTTP for whole answers.

    python -m bench.peers.llama_cpp_peer SERVER

Modes and options: `plain`; `draft` (`k` tokens a round, 3); `ngram-simple`, `ngram-map-k`,
`ngram-map-k4v` (`n` tokens to match, `max` drafted, `hits`), `ngram-mod` (`n`, `max`, `min`) and
`ngram-cache`; `combined` (`k`, `n`, `max`, `hits`): `ngram-simple`, and `draft` where it has
nothing. Without options the server's own defaults. The n-gram modes but `ngram-simple` keep
what they saw between requests and would replay an answer the second time, so their server starts
anew for each.

Float32 needs the plain attention and float32 caches to agree with other engines; the other
precisions run as the server does by default. Times are those the server reports: `prompt_ms` ends
with the first token, `predicted_ms` is the time of all others.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from bench.peers.protocol import (
    Answer,
    Load,
    Loaded,
    PeerFailure,
    Run,
    number,
    only_options,
    serve,
)

START_SECONDS = 120.0
ANSWER_SECONDS = 600.0
_REMEMBERING = ("ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
_OPTIONS: dict[str, dict[str, str]] = {
    "plain": {},
    "draft": {"k": "--spec-draft-n-max"},
    "ngram-cache": {},
    "ngram-mod": {
        "n": "--spec-ngram-mod-n-match",
        "max": "--spec-ngram-mod-n-max",
        "min": "--spec-ngram-mod-n-min",
    },
    **{
        f"ngram-{kind}": {
            "n": f"--spec-ngram-{kind}-size-n",
            "max": f"--spec-ngram-{kind}-size-m",
            "hits": f"--spec-ngram-{kind}-min-hits",
        }
        for kind in ("simple", "map-k", "map-k4v")
    },
}
_OPTIONS["combined"] = _OPTIONS["draft"] | _OPTIONS["ngram-simple"]
_TYPES = {"draft": "draft-simple", "combined": "ngram-simple,draft-simple"}


class Server:
    """A running llama-server."""

    def __init__(self, command: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a completion request."""
        request = urllib.request.Request(
            f"{self._address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:300]
            raise PeerFailure(f"llama-server refused a request: {text}") from None
        except OSError as error:
            raise PeerFailure(f"llama-server gave no answer ({error}).") from None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        """Until the models are loaded."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            code = self._process.poll()
            if code is not None:
                raise PeerFailure(f"llama-server ended with code {code} before it was ready.")
            try:
                with urllib.request.urlopen(f"{self._address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        raise PeerFailure(f"llama-server was not ready after {START_SECONDS:.0f} s.")


class LlamaCpp:
    """The servers that run, one a mode with its options."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._load: Load | None = None
        self._servers: dict[tuple[str, ...], Server] = {}

    def load(self, request: Load) -> Loaded:
        """Remember the files; servers start when they are first asked."""
        self._load = request
        try:
            done = subprocess.run(
                [self._program, "--version"], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerFailure(f"{self._program} does not run ({error}).") from None
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "version" in line]
        return Loaded(versions={"llama.cpp": lines[0].strip() if lines else "unknown"})

    def run(self, request: Run) -> Answer:
        """One answer, by the server of its mode."""
        if self._load is None:
            raise PeerFailure("A request came before the models were named.")
        command = server_command(self._program, self._load, request)
        key = tuple(command)
        server = self._servers.pop(key, None) or _warm(Server(command))
        try:
            reply = server.ask(completion_body(request.prompt, request.max_tokens))
        except BaseException:
            server.close()
            raise
        if request.mode in _REMEMBERING:
            server.close()
        else:
            self._servers[key] = server
        return read_reply(reply)

    def close(self) -> None:
        """End every server."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()


def server_command(program: str, load: Load, request: Run) -> list[str]:
    """How a server for a mode is started, without its address."""
    if request.mode not in _OPTIONS:
        raise PeerFailure(f"Modes of llama.cpp: {', '.join(_OPTIONS)}; got {request.mode!r}.")
    flags = _OPTIONS[request.mode]
    only_options(request.mode, request.options, tuple(flags))
    threads, is_exact = str(load.threads), load.dtype == "float32"
    command = [program, "--model", load.target, "--ctx-size", str(load.context)]
    command += ["--threads", threads, "--threads-batch", threads, "--parallel", "1"]
    command += ["--cache-ram", "0", "--log-verbosity", "1"]
    if is_exact:
        command += ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
    if request.mode != "plain":
        command += ["--spec-type", _TYPES.get(request.mode, request.mode)]
    if request.mode in _TYPES:
        if load.draft is None:
            raise PeerFailure(f"Mode {request.mode} needs a draft model, got none.")
        command += ["--spec-draft-model", load.draft]
        command += ["--spec-draft-threads", threads, "--spec-draft-threads-batch", threads]
        if is_exact:
            command += ["--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32"]
    for name in request.options:
        command += [flags[name], str(number(request.options, name, 0))]
    return command


def completion_body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """A greedy request for exactly so many tokens, as ids, with nothing reused from before."""
    return {
        "prompt": prompt,
        "n_predict": max_tokens,
        "temperature": 0.0,
        "samplers": ["temperature"],
        "cache_prompt": False,
        "return_tokens": True,
        "stream": False,
    }


def read_reply(reply: dict[str, Any]) -> Answer:
    """An answer from the server's own figures."""
    tokens, timings = reply["tokens"], reply["timings"]
    return Answer(
        tokens=tokens,
        text=reply.get("content"),
        first_s=timings["prompt_ms"] / 1000,
        decode_s=timings["predicted_ms"] / 1000,
        decode_tokens=len(tokens) - 1,
        drafted=timings.get("draft_n"),
        accepted=timings.get("draft_n_accepted"),
    )


def _warm(server: Server) -> Server:
    """A server that has answered once: its memory is mapped."""
    server.ask(completion_body([1, 2, 3, 4], 8))
    return server


if __name__ == "__main__":
    peer = LlamaCpp(sys.argv[1])
    try:
        serve(peer.load, peer.run)
    finally:
        peer.close()
