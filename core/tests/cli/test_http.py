"""The small client, against a small server."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from light_core.cli.http import Server
from light_core.errors import ConfigError, LightError


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `seen` of the server has what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        events = ['data: {"n": 1}', "", ": a comment", 'data:{"n": 2}', "", "data: [DONE]", "", 'data: {"n": 3}', "", ""]
        if self.path.endswith("/refused"):
            self._answer(400, json.dumps({"error": {"message": "max_tokens must be 1 or more"}}))
        elif self.path.endswith("/crashed"):
            self._answer(502, "<html>bad gateway</html>")
        elif self.path.endswith("/broken"):
            self._answer(200, 'data: {"n": 1}\n\ndata: {"error": {"message": "the engine has stopped"}}\n\n')
        else:
            self._answer(200, "\n".join(events))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def peer() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(peer: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{peer.server_address[1]}"


def test_the_first_model(peer: ThreadingHTTPServer) -> None:
    assert Server(url_of(peer)).model() == "first"


@pytest.mark.parametrize(
    ("suffix", "path"), [("", "/v1/x"), ("/", "/v1/x"), ("/v1", "/v1/x"), ("/v1/", "/v1/x"), ("/proxy/v1", "/proxy/v1/x")]
)
def test_paths_and_keys(peer: ThreadingHTTPServer, suffix: str, path: str) -> None:
    list(Server(url_of(peer) + suffix, "key").stream("/v1/x", {"a": 1}))
    assert peer.seen == [(path, "Bearer key", {"a": 1})]  # type: ignore[attr-defined]


def test_a_stream_ends_at_done(peer: ThreadingHTTPServer) -> None:
    assert list(Server(url_of(peer)).stream("/v1/x", {})) == [{"n": 1}, {"n": 2}]


def test_an_error_in_a_stream(peer: ThreadingHTTPServer) -> None:
    stream = Server(url_of(peer)).stream("/v1/broken", {})
    assert next(stream) == {"n": 1}
    with pytest.raises(LightError, match="the engine has stopped"):
        next(stream)


@pytest.mark.parametrize(("path", "words"), [("/v1/refused", "400: max_tokens must be"), ("/v1/crashed", "502: <html>bad gateway")])
def test_refusals(peer: ThreadingHTTPServer, path: str, words: str) -> None:
    with pytest.raises(LightError, match=words):
        Server(url_of(peer)).call("POST", path, {})


def test_nobody_there() -> None:
    with socket.socket() as holder:  # bound, so that nobody else listens there, and not listening
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(LightError, match="no server answers") as caught:
            Server(f"http://127.0.0.1:{holder.getsockname()[1]}").model()
    assert "light serve" in caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "nonsense"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Server(url)
