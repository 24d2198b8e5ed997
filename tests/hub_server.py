"""A hub for tests: what `huggingface_hub` asks of one, answered on loopback for a few repositories.

Each repository is a dict of file contents; how it misbehaves is set on the server.
"""

import contextlib
import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """What the server has, how it fails, and what it was asked for."""

    repos: dict[str, dict[str, bytes]]
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    refusals: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    cut_at: dict[str, int] = dataclasses.field(default_factory=dict)
    stalled: dict[str, threading.Event] = dataclasses.field(default_factory=dict)
    private_token: str | None = None
    files_are_gated: bool = False
    asked: list[str] = dataclasses.field(default_factory=list)
    url: str = ""

    def fetched(self):
        """The files whose content was asked for."""
        return [
            path.rsplit("/", 1)[1]
            for path in self.asked
            if path.startswith("GET /") and "/resolve/" in path
        ]


@contextlib.contextmanager
def serving(repos):
    hub = Hub(repos=repos)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            for event in hub.stalled.values():
                event.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *args):
        pass

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.hub.refusals:
            status, code = self.hub.refusals[repo]
            return self._send(status, b"{}", {"X-Error-Code": code} if code else {})
        token = self.headers.get("Authorization")
        private = self.hub.private_token
        if repo not in self.hub.repos or (private and token != f"Bearer {private}"):
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if len(rest) > 1 and rest[1] not in self.hub.revisions:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repos[repo]
        if is_api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in files.items()
            ]
            return self._send(200, json.dumps(entries).encode())
        if is_api:
            siblings = [{"rfilename": name} for name in files]
            account = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False}
            return self._send(200, json.dumps(account).encode())
        if self.hub.files_are_gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        name = "/".join(rest[2:])
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = files[name]
        if self.command == "GET" and name in self.hub.stalled:
            self._headers(200, len(data), {})
            self.wfile.write(data[:1])
            self.hub.stalled[name].wait(300)
            return None
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}
        self._send(200, data, headers, cut_at=self.hub.cut_at.get(name))
        return None

    def _headers(self, status, length, headers):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, status, data, headers=None, cut_at=None):
        self._headers(status, len(data), headers or {})
        if self.command == "GET":
            self.wfile.write(data[:cut_at])
        self.close_connection = True


def _etag(data):
    return hashlib.sha1(data).hexdigest()
