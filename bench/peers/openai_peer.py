"""Any server with OpenAI's completions endpoint as a peer, such as vLLM or SGLang.

The one mode, `plain`, is what the server was started to do; its options and precision are its own.
`target` of the load request is its address up to `/v1`; `draft` is not used. Prompts go as token
ids. Where the server returns ids (`return_token_ids`, vLLM) the answer has them, else its text.
Times are those of the client: until the first piece of the stream, and from there to the last.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from bench.peers.protocol import Answer, Load, Loaded, PeerFailure, Run, only_options, serve

SECONDS = 600.0


class OpenAI:
    """The server's address and the name of its model, once they are known."""

    def __init__(self) -> None:
        self._address = ""
        self._model = ""

    def load(self, request: Load) -> Loaded:
        """Ask which model there is."""
        self._address = request.target.rstrip("/")
        with self._open("/models", None) as reply:
            models = json.load(reply).get("data") or []
        if not models:
            raise PeerFailure(f"{self._address}/models should name a model, it names none.")
        self._model = models[0]["id"]
        return Loaded(versions={"server": self._address, "model": self._model})

    def run(self, request: Run) -> Answer:
        """One answer, streamed."""
        if request.mode != "plain":
            raise PeerFailure(
                f"A server has the mode plain only, got {request.mode!r}: start it with that mode."
            )
        only_options("plain", request.options, ())
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "return_token_ids": True,
        }
        started = time.perf_counter()
        with self._open("/completions", body) as reply:
            return read_stream(_events(reply), started)

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:  # noqa: ANN401 (a response)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._address + path, data, headers)
            return urllib.request.urlopen(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:300]
            raise PeerFailure(f"{self._address}{path} answered {error.code}: {text}") from None
        except (OSError, ValueError) as error:
            raise PeerFailure(f"{self._address}{path} cannot be reached ({error}).") from None


def read_stream(events: Iterator[tuple[float, dict[str, Any]]], started: float) -> Answer:
    """An answer from the pieces of a stream, each with the time at which it came."""
    tokens: list[int] = []
    text: list[str] = []
    first: float | None = None
    last, first_tokens, counted, has_ids = started, 1, None, True
    for came, event in events:
        if error := event.get("error"):
            raise PeerFailure(f"The server broke off: {error}")
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids")
            if not ids and not choice.get("text"):
                continue
            has_ids = has_ids and ids is not None
            tokens += ids or []
            text.append(choice.get("text") or "")
            last = came
            if first is None:
                first, first_tokens = came, len(ids or [None])
    number = len(tokens) if has_ids else counted
    if first is None or number is None:
        raise PeerFailure("The server gave no tokens, or did not count them.")
    return Answer(
        tokens=tokens if has_ids else None,
        text="".join(text),
        first_s=first - started,
        decode_s=last - first,
        decode_tokens=number - first_tokens,
    )


def _events(reply: Any) -> Iterator[tuple[float, dict[str, Any]]]:  # noqa: ANN401 (a response)
    """The JSON objects of a stream of server-sent events, and when they came."""
    for line in reply:
        content = line.strip()
        if content.startswith(b"data:"):
            content = content[5:].strip()
            if content == b"[DONE]":
                return
            yield time.perf_counter(), json.loads(content)


if __name__ == "__main__":
    peer = OpenAI()
    serve(peer.load, peer.run)
