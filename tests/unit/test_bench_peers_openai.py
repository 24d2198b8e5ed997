"""The peer for OpenAI-compatible servers, against one that is a stub."""

import http.server
import json
import threading

import pytest

from bench.peers.openai_peer import OpenAI, read_stream
from bench.peers.protocol import Load, PeerFailure, Run

REQUEST = Run(mode="plain", options={}, prompt=[5, 6], max_tokens=3)


class Handler(http.server.BaseHTTPRequestHandler):
    """Streams what `server.pieces` holds, and keeps the requests in `server.bodies`."""

    def log_message(self, *parts):
        pass

    def do_GET(self):
        self.reply(200, json.dumps({"data": self.server.models}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        if self.server.pieces is None:
            self.reply(400, b"prompt must be text")
            return
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in self.server.pieces]
        self.reply(200, "".join([": hello\n", *lines, "data: [DONE]\n\n"]).encode())

    def reply(self, code, data):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies, server.pieces, server.models = [], [], [{"id": "model-7"}]
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


USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


def test_an_answer_with_ids_is_read_from_the_stream(server):
    peer, loaded = load(server)
    assert loaded.versions["model"] == "model-7"
    server.pieces = [piece("a", [7, 8]), piece("b", [9]), piece("", []), USAGE]
    answer = peer.run(REQUEST)
    assert (answer.tokens, answer.text, answer.decode_tokens) == ([7, 8, 9], "ab", 1)
    ((path, body),) = server.bodies
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["model"]) == ([5, 6], 3, "model-7")
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0.0, True, True)


def test_an_answer_without_ids_is_text_and_counted_by_the_server(server):
    peer, _ = load(server)
    server.pieces = [piece("de"), piece("f"), USAGE]
    answer = peer.run(REQUEST)
    assert (answer.tokens, answer.text, answer.decode_tokens) == (None, "def", 2)


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        (None, "400: prompt must be text"),
        ([USAGE], "no tokens"),
        ([piece("de"), piece("f")], "did not count them"),
        ([piece("de"), {"error": {"message": "out of memory"}}], "out of memory"),
    ],
)
def test_what_a_server_fails_to_do_is_said(server, pieces, complaint):
    peer, _ = load(server)
    server.pieces = pieces
    with pytest.raises(PeerFailure, match=complaint):
        peer.run(REQUEST)


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
    answer = read_stream(iter(events), started=1.0)
    assert (answer.first_s, answer.decode_s, answer.decode_tokens) == (0.5, 2.5, 2)
