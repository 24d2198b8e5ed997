"""The peer for OpenAI-compatible servers, against one that is a stub."""

import http.server
import json
import threading

import pytest

from bench.peers.openai_peer import OpenAI, check_answer, read_stream
from bench.peers.protocol import Load, PeerFailure, Run

REQUEST = Run(mode="plain", options={}, prompt=[5, 6], max_tokens=3)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with `server.pieces` and keeps the requests in `server.bodies`."""

    def log_message(self, *parts):
        pass

    def do_GET(self):
        self.reply(200, json.dumps({"data": self.server.models}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        pieces = self.server.pieces
        if pieces is None:
            self.reply(400, b"prompt must be text")
        elif isinstance(pieces, dict):
            self.reply(200, json.dumps(pieces).encode())
        else:
            lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
            end = "data: [DONE]\n\n" if self.server.ends else ""
            stream = "".join([": hello\n", *lines, end])
            self.reply(200, stream.encode(), "text/event-stream; charset=utf-8")

    def reply(self, code, data, kind="application/json"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies, server.pieces, server.ends = [], [], True
        server.models = [{"id": "model-7", "owned_by": "stub"}]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def load(server):
    peer = OpenAI()
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    loaded = peer.load(Load(target=address, draft=None, dtype="float32", threads=1, context=64))
    return peer, loaded


def piece(text, ids=None):
    return {"choices": [{"text": text} | ({} if ids is None else {"token_ids": ids})]}


def usage(completion=3, prompt=2, **more):
    counts = {"completion_tokens": completion, "prompt_tokens": prompt}
    return {"choices": [], "usage": counts | more}


USAGE = usage()


def test_an_answer_with_ids_is_read_from_the_stream(server):
    peer, loaded = load(server)
    assert (loaded.versions["model"], loaded.versions["engine"]) == ("model-7", "stub")
    server.pieces = [piece("a", [7, 8]), piece("b", [9]), piece("", []), USAGE]
    answer = peer.run(REQUEST)
    assert (answer.tokens, answer.text, answer.decode_tokens) == ([7, 8, 9], "ab", 1)
    ((path, body),) = server.bodies
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["model"]) == ([5, 6], 3, "model-7")
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0.0, True, True)
    assert (body["repetition_penalty"], body["return_token_ids"]) == (1.0, True)
    assert "min_tokens" not in body  # it would change what a greedy answer is


def test_an_answer_without_ids_is_text_and_counted_by_the_server(server):
    peer, _ = load(server)
    server.pieces = [piece("de"), piece("f"), USAGE]
    answer = peer.run(REQUEST)
    assert (answer.tokens, answer.text, answer.decode_tokens) == (None, "def", 2)


def test_tokens_of_the_first_piece_are_counted_where_the_server_tells(server):
    peer, _ = load(server)
    first = usage(completion=2) | piece("de")
    server.pieces = [first, piece("f"), USAGE]
    assert peer.run(REQUEST).decode_tokens == 1


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (None, "400: prompt must be text A server must have .* token ids"),
        ({"choices": []}, "answer with a stream, got application/json"),
        ([USAGE], "no tokens"),
        ([piece("de"), piece("f")], r"neither their ids nor their number: .*include_usage"),
        ([piece("de"), {"error": {"message": "out of memory"}}], "out of memory"),
        ([piece("de"), usage(prompt=3)], r"prompt's 2 ids as they are, it read 3 tokens"),
        ([piece("d", [7, 8]), usage(prompt=1)], "it read 1 tokens"),
        (
            [{"choices": [{"text": "d", "finish_reason": "stop"}]}, usage(completion=2)],
            "should give 3 tokens, it gave 2 and ended by 'stop': it should know ignore_eos",
        ),
        ([piece("d", [7, 8])], "should give 3 tokens, it gave 2"),
        (
            [piece("def"), usage(prompt_tokens_details={"cached_tokens": 1})],
            "it remembered 1 tokens: start it with --no-enable-prefix-caching",
        ),
    ],
)
def test_what_a_server_fails_to_do_is_said(server, pieces, complaint):
    peer, _ = load(server)
    server.pieces = pieces
    with pytest.raises(PeerFailure, match=complaint):
        peer.run(REQUEST)


def test_a_stream_that_breaks_off_is_told(server):
    peer, _ = load(server)
    server.pieces, server.ends = [piece("de")], False
    with pytest.raises(PeerFailure, match="broke off"):
        peer.run(REQUEST)


def test_what_the_server_does_not_tell_is_not_held_against_it(server):
    peer, _ = load(server)
    none = {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens_details": None}}
    server.pieces = [piece("d", [7]), piece("e", [8, 9]), none]
    assert peer.run(REQUEST).tokens == [7, 8, 9]


def test_a_server_without_a_model_or_an_address_without_a_server_is_named(server):
    server.models = []
    with pytest.raises(PeerFailure, match="names none"):
        load(server)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    for address in (f"http://127.0.0.1:{port}/v1", "nonsense"):
        with pytest.raises(PeerFailure, match="cannot be reached"):
            OpenAI().load(Load(target=address, draft=None, dtype="float32", threads=1, context=64))


def test_a_server_has_one_mode(server):
    peer, _ = load(server)
    with pytest.raises(PeerFailure, match="'draft'"):
        peer.run(Run(mode="draft", options={}, prompt=[1], max_tokens=1))


def test_times_are_from_the_first_piece_on():
    events = [(1.5, piece("a", [7])), (2.0, piece("", [])), (4.0, piece("b", [8, 9])), (9.0, USAGE)]
    answer = check_answer(read_stream(iter(events)), 1.0, REQUEST)
    assert (answer.first_s, answer.decode_s, answer.decode_tokens) == (0.5, 2.5, 2)
