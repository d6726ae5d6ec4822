"""Bodies of requests: read within the limit, decoded to typed structs, every fault a 400 that names the field."""

import logging
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from light_core.server.errors import HTTPProblem

__all__ = ["BodyDecoder"]

logger = logging.getLogger(__name__)

_PATH = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")
_MAX_UNKNOWN_NAMES = 256

T = TypeVar("T", bound=msgspec.Struct)


class BodyDecoder:
    """Reads JSON bodies.

    Args:
        max_bytes: bound of a body; a larger one is answered 413 without being read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # Each unknown name is logged once: a client that sends one sends it with every request.
        self._unknown: set[str] = set()

    async def read(self, request: Request, kind: type[T]) -> T:
        """The body of `request` as a `kind`; `null` counts as absent, unknown fields are ignored with one warning.

        Raises:
            HTTPProblem: 400, 413 or 415.
            starlette.requests.ClientDisconnect: the client went away.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise HTTPProblem(415, "send JSON with the header 'Content-Type: application/json'")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPProblem(415, "compressed bodies are not supported: send it without Content-Encoding")
        return self.decode(await self._read(request), kind)

    async def _read(self, request: Request) -> bytearray:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_bytes:
                raise HTTPProblem(413, f"the body is larger than {self._max_bytes} bytes", headers={"Connection": "close"})
        return body

    def decode(self, body: bytes | bytearray, kind: type[T]) -> T:
        """As `read`, of bytes that are there already."""
        try:
            raw = msgspec.json.decode(body)
        except RecursionError as error:
            raise HTTPProblem(400, "the body is nested too deeply", code="invalid_json") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HTTPProblem(400, f"the body is not valid JSON: {_plain(str(error))}", code="invalid_json") from error
        if not isinstance(raw, dict):
            raise HTTPProblem(400, "the body must be a JSON object", code="invalid_json")
        return self.convert(raw, kind)

    def convert(self, raw: dict[str, Any], kind: type[T]) -> T:
        """As `decode`, of an object that is decoded already."""
        known = kind.__struct_encode_fields__
        self._warn({name for name in raw if name not in known})
        try:
            return msgspec.convert({name: value for name, value in raw.items() if value is not None}, kind, str_keys=True)
        except RecursionError as error:
            raise HTTPProblem(400, "the body is nested too deeply", code="invalid_json") from error
        except msgspec.ValidationError as error:
            raise _invalid(error) from error

    def _warn(self, names: set[str]) -> None:
        fresh = names - self._unknown
        if not fresh or len(self._unknown) >= _MAX_UNKNOWN_NAMES:
            return
        shown = sorted(fresh)[:20]
        self._unknown.update(shown)
        logger.warning("fields of a request that are not known are ignored: %s", ", ".join(f"{name!r:.60}" for name in shown))


def _plain(text: str) -> str:
    return re.sub(r"'utf-8' codec can't decode.*", "it is not UTF-8", text)[:200]


def _invalid(error: msgspec.ValidationError) -> HTTPProblem:
    text = str(error)
    found = _PATH.search(text)
    path = found[1] if found else ""
    if not path and (missing := re.search(r"missing required field `(\w+)`", text)):
        return HTTPProblem(400, f"{missing[1]} is required", param=missing[1])
    reason = (text[: found.start()] if found else text).replace("`", "").replace(" | null", "")
    param: Any = re.split(r"[.\[]", path)[0] or None
    return HTTPProblem(400, f"{path[:100]}: {reason[:1].lower()}{reason[1:]}" if path else reason, param=param)
