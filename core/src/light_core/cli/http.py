"""A small client of a running server: JSON calls and streamed answers. For `light chat` and `light bench serve`."""

import contextlib
import http.client
import json
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

from light_core.errors import ConfigError, LightError

__all__ = ["Server"]


class Server:
    """A server at `url`.

    Args:
        url: http://host:port, with or without a path before /v1.
        api_key: if it asks for one.
        timeout_s: of connecting and between two pieces of an answer.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url!r} is not an address", "it needs a scheme and a host", "write it like http://127.0.0.1:8000")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._timeout_s, self.url = timeout_s, url

    def model(self) -> str:
        """Name of the first model that it serves."""
        models = self.call("GET", "/v1/models")["data"]
        return str(models[0]["id"])

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One JSON call; raises `LightError` with the server's message for any status but 200."""
        with self._send(method, path, body) as answer:
            return json.loads(answer.read())

    def stream(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Events of a streamed answer, until [DONE]. Closing the iterator closes the connection."""
        with self._send("POST", path, body) as answer:
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if event.get("error"):
                    raise LightError("the server ended the answer", str(event["error"].get("message", event["error"])))
                yield event

    @contextlib.contextmanager
    def _send(self, method: str, path: str, body: Any) -> Generator[http.client.HTTPResponse, None, None]:
        """The answer, on a connection of its own that ends with the block."""
        connection = self._kind(self._host, self._port, timeout=self._timeout_s)
        with contextlib.closing(connection):
            try:
                connection.request(method, self._path + path, json.dumps(body) if body is not None else None, self._headers)
                answer = connection.getresponse()
            except OSError as error:
                remedy = "start one with `light serve MODEL`, or give --url"
                raise LightError(f"no server answers at {self.url}", str(error), remedy) from error
            with answer:
                if answer.status != 200:
                    raise LightError(f"the server answered {answer.status}", _message(answer.read()), "see the server's log")
                yield answer


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]
