"""The outermost layer of the application: keys, request ids, and a last answer to every error.

Every path needs a key unless it is listed as public here: a route that nobody thought of is closed.
"""

import hmac
import re
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from light_core.server.context import ServerContext
from light_core.server.errors import HTTPProblem, error_response, problem_of

__all__ = ["PUBLIC_PATHS", "Gateway"]

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/version"})

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gateway:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app, self._context = app, context
        self._keys = tuple(key.encode() for key in context.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._context.metrics.count_response(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            if self._keys and scope["path"] not in PUBLIC_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception as error:
            problem = problem_of(error)
            if started:
                # Half an answer is out: only closing the connection tells the client that the rest is missing.
                raise
            await error_response(problem)(scope, receive, send_with_id)

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, so that the time does not tell which one came close.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise HTTPProblem(401, "this server needs an API key: send 'Authorization: Bearer KEY'", headers={"WWW-Authenticate": "Bearer"})
