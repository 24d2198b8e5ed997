"""Any server with OpenAI's completions endpoint as a peer, such as vLLM, SGLang or llama-server.

The one mode, `plain`, is what the server was started to do; its options and precision are its own.
`target` of the load request is its address up to `/v1`; `draft` is not used. Prompts go as token
ids. Where the server returns ids (`return_token_ids` of vLLM and SGLang) the answer has them, else
its text. Times are those of the client: until the first piece of the stream, and from there to the
last.

All that a server must do to be comparable is checked in each answer: take the prompt's ids as they
are, read all of them anew, go on to the last token, stream. `ignore_eos` asks for the third;
`min_tokens` would not do, since it forbids the ends of text, and the tokens would be others.
Penalties are switched off by name: vLLM and SGLang take what is not named from the model's
generation_config.json.
"""

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from bench.peers.protocol import Answer, Load, Loaded, PeerFailure, Run, only_options, serve

SECONDS = 600.0
NEEDS = (
    "A server must have OpenAI's completions (not chat alone), take prompts as token ids, and bear "
    "with ignore_eos and other fields of vLLM."
)


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
        engine = models[0].get("owned_by") or "unknown"
        return Loaded(versions={"server": self._address, "engine": engine, "model": self._model})

    def run(self, request: Run) -> Answer:
        """One answer, streamed."""
        if request.mode != "plain":
            raise PeerFailure(
                f"A server has the mode plain only, got {request.mode!r}: start it with that mode."
            )
        only_options("plain", request.options, ())
        started = time.perf_counter()
        with self._open("/completions", completion_body(self._model, request)) as reply:
            kind = reply.headers.get_content_type()
            if kind != "text/event-stream":
                raise PeerFailure(
                    f"{self._address}/completions should answer with a stream, got {kind}: without "
                    "one nothing tells when the first token was there."
                )
            try:
                stream = read_stream(_events(reply))
            except (OSError, http.client.HTTPException) as error:
                raise PeerFailure(f"{self._address} broke off its answer ({error}).") from None
        return check_answer(stream, started, request)

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
            needs = f" {NEEDS}" if body else ""
            raise PeerFailure(
                f"{self._address}{path} answered {error.code}: {text}{needs}"
            ) from None
        except (OSError, ValueError) as error:
            raise PeerFailure(f"{self._address}{path} cannot be reached ({error}).") from None


def completion_body(model: str, request: Run) -> dict[str, Any]:
    """A greedy request for exactly so many tokens, in the words of all servers together."""
    return {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
        "return_token_ids": True,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """What came in a stream.

    Attributes:
        tokens: ids, None if a piece came without.
        text: of all pieces.
        first, last: when the first and the last piece came, None without any.
        first_tokens: how many came in the first piece; one, if the server does not tell.
        usage: the server's own count, as it was told last.
        reason: why it ended, in the server's word.
    """

    tokens: list[int] | None
    text: str
    first: float | None
    last: float
    first_tokens: int
    usage: dict[str, Any]
    reason: str | None


def read_stream(events: Iterator[tuple[float, dict[str, Any]]]) -> Stream:
    """All pieces of a stream, each with the time at which it came."""
    tokens: list[int] = []
    text: list[str] = []
    usage: dict[str, Any] = {}
    first, last, first_tokens, has_ids, reason = None, 0.0, 1, True, None
    for came, event in events:
        if error := event.get("error"):
            raise PeerFailure(f"The server broke off: {error}")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            ids = choice.get("token_ids")
            if not ids and not choice.get("text"):
                continue
            has_ids = has_ids and ids is not None
            tokens += ids or []
            text.append(choice.get("text") or "")
            last = came
            if first is None:
                first = came
                first_tokens = len(ids) if ids else usage.get("completion_tokens", 1)
    return Stream(
        tokens=tokens if has_ids else None,
        text="".join(text),
        first=first,
        last=last,
        first_tokens=first_tokens,
        usage=usage,
        reason=reason,
    )


def check_answer(stream: Stream, started: float, request: Run) -> Answer:
    """The answer that a stream is, if it is one to what was asked.

    Raises:
        PeerFailure: it is not, and what the server should do.
    """
    usage = stream.usage
    number = usage.get("completion_tokens") if stream.tokens is None else len(stream.tokens)
    if stream.first is None or number is None:
        raise PeerFailure(
            "The server gave no tokens, or neither their ids nor their number: it should know "
            "return_token_ids or stream_options.include_usage."
        )
    read = usage.get("prompt_tokens", len(request.prompt))
    if read != len(request.prompt):
        raise PeerFailure(
            f"The server should read the prompt's {len(request.prompt)} ids as they are, it read "
            f"{read} tokens: it takes them for something else, or puts a token in front."
        )
    if number != request.max_tokens:
        raise PeerFailure(
            f"The server should give {request.max_tokens} tokens, it gave {number} and ended by "
            f"{stream.reason!r}: it should know ignore_eos and have room for the whole answer."
        )
    if cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens"):
        raise PeerFailure(
            f"The server should read every prompt anew, it remembered {cached} tokens: start it "
            "with --no-enable-prefix-caching (vLLM), --disable-radix-cache (SGLang) or "
            "--no-cache-prompt (llama-server)."
        )
    return Answer(
        tokens=stream.tokens,
        text=stream.text,
        first_s=stream.first - started,
        decode_s=stream.last - stream.first,
        decode_tokens=number - stream.first_tokens,
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
    raise PeerFailure("The server should end its answer with [DONE], it broke off.")


if __name__ == "__main__":
    peer = OpenAI()
    serve(peer.load, peer.run)
