"""Errors as clients see them: every status with a body `{"error": {"message", "type", "param", "code"}}`.

Messages are written for clients: no path, address, traceback or key ever goes into one.
"""

import logging
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from light_core.errors import EngineDeadError, LightError, OverloadedError, RequestError

__all__ = ["HTTPProblem", "error_body", "error_response", "problem_of"]

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "server_overloaded",
    431: "request_header_too_large",
    500: "internal_error",
    503: "service_unavailable",
}


class HTTPProblem(Exception):
    """An answer other than success.

    Args:
        status: HTTP status, 400 or more.
        message: for the client.
        param: the request field that is at fault.
        code: machine-readable; by default that of the status.
        headers: more headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code if code is not None else _CODES.get(status)
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON body."""
        return error_body(self.status, self.message, self.type, self.param, self.code)


def error_body(status: int, message: str, kind: str | None = None, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON body of an error; `kind` and `code` follow from the status where they are not given."""
    kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}})


def error_response(problem: HTTPProblem) -> Response:
    """`problem` as a response."""
    return Response(problem.body(), problem.status, headers=problem.headers, media_type="application/json")


def problem_of(error: BaseException) -> HTTPProblem:
    """The answer to `error`; logs what is our own fault, and never shows it to the client."""
    match error:
        case HTTPProblem():
            return error
        case RequestError():
            return HTTPProblem(400, str(error), param=error.param)
        case OverloadedError():
            return HTTPProblem(429, error.error, headers={"Retry-After": str(error.retry_after_s)})
        case EngineDeadError():
            # Whoever noticed has told it, once for all requests.
            logger.debug("a request failed: %s", error)
            return HTTPProblem(503, "the engine has stopped", code="engine_dead", headers={"Retry-After": "5"})
        case RecursionError():
            return HTTPProblem(400, "the request is nested too deeply")
        case LightError():
            logger.error("a request failed: %s", error)
        case _:
            logger.error("a request failed", exc_info=error)
    # The same request would fail in the same way: clients that retry 500 by themselves are told not to.
    return HTTPProblem(500, "the server failed on this request", headers={"x-should-retry": "false"})
