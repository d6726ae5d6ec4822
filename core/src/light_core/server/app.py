"""The HTTP application: routes, and the document that describes them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from light_core.errors import LightError
from light_core.server import chat_completions, completions, native, schema, status, tokens
from light_core.server.client import EngineClient
from light_core.server.context import ServerContext
from light_core.server.errors import HTTPProblem, error_response, problem_of
from light_core.server.gateway import Gateway
from light_core.server.settings import ServerSettings
from light_core.text.tokenizer import Tokenizer
from light_core.types import ChatSpec

__all__ = ["context_of", "create_app"]

Endpoint = Callable[[ServerContext, Request], Awaitable[Response]]

_POSTS: tuple[tuple[str, Endpoint, str, type, type | None], ...] = (
    ("/v1/chat/completions", chat_completions.chat, "Reply to a conversation.", schema.ChatCompletionRequest, schema.ChatCompletion),
    ("/v1/completions", completions.complete, "Continue text or token ids.", schema.CompletionRequest, schema.Completion),
    ("/tokenize", tokens.tokenize, "Token ids of a text or a conversation.", schema.TokenizeRequest, schema.TokenizeResponse),
    ("/detokenize", tokens.detokenize, "Text of token ids.", schema.DetokenizeRequest, schema.DetokenizeResponse),
    ("/generate", native.generate, "LightLLM's API: continue text or token ids.", native.GenerateRequest, None),
    ("/generate_stream", native.generate_stream, "LightLLM's API, as a stream of tokens.", native.GenerateRequest, None),
)
_REFS = "#/components/schemas/{name}"
_ERRORS = {
    400: "A field is missing or out of range.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    503: "The engine is loading, draining or dead.",
}


def create_app(client: EngineClient, tokenizer: Tokenizer | None, settings: ServerSettings, chat: ChatSpec | None = None) -> FastAPI:
    """The application around an engine.

    Args:
        client: the engine.
        tokenizer: None takes and gives token ids alone.
        settings: names, keys and limits.
        chat: what the model's plugin says of conversations.

    Raises:
        ModelError: the chat template cannot be compiled.
    """
    context = ServerContext(client, tokenizer, settings, chat)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            context.prompts.close()

    app = FastAPI(title="Light", version=context.version, lifespan=lifespan, redirect_slashes=False, docs_url="/docs", redoc_url=None)
    app.state.light = context
    _add_posts(app, context)
    _add_gets(app, context)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(HTTPProblem, _problem)
    app.add_exception_handler(LightError, _problem)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Gateway, context=context)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    return app


def context_of(app: FastAPI) -> ServerContext:
    """The parts that `create_app` gave `app`."""
    context = app.state.light
    assert isinstance(context, ServerContext)
    return context


def _add_posts(app: FastAPI, context: ServerContext) -> None:
    def bind(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await endpoint(context, request)

        return answer

    for path, endpoint, summary, request, response in _POSTS:
        content = {"application/json": {"schema": {"$ref": _REFS.format(name=request.__name__)}}}
        answers: dict[int | str, dict[str, Any]] = {
            code: {"description": text, "content": _error_content()} for code, text in _ERRORS.items()
        }
        answers[200] = {"description": "The answer; with `stream`, server-sent events."}
        if response is not None:
            answers[200]["content"] = {"application/json": {"schema": {"$ref": _REFS.format(name=response.__name__)}}}
        app.add_api_route(
            path,
            bind(endpoint),
            methods=["POST"],
            summary=summary,
            name=endpoint.__name__,
            response_class=Response,
            responses=answers,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )


def _add_gets(app: FastAPI, context: ServerContext) -> None:
    gets: tuple[tuple[str, Callable[[], Response], str], ...] = (
        ("/health", lambda: status.health(context), "Ready for requests?"),
        ("/health/ready", lambda: status.health(context), "Ready for requests?"),
        ("/health/live", status.live, "Does the server answer?"),
        ("/ping", lambda: status.health(context), "Ready for requests? (SageMaker)"),
        ("/version", lambda: status.version(context), "Version of light-core."),
        ("/v1/models", lambda: status.models(context), "Served models."),
        ("/metrics", lambda: status.metrics(context), "Prometheus metrics."),
    )
    routes = {path: summary for path, _, summary in gets} | {path: summary for path, _, summary, _, _ in _POSTS}

    def bind(answer: Callable[[], Response]) -> Callable[[], Awaitable[Response]]:
        async def endpoint() -> Response:
            return answer()

        return endpoint

    for path, answer, summary in (*gets, ("/", lambda: status.index(context, routes), "What is here.")):
        app.add_api_route(path, bind(answer), methods=["GET"], summary=summary, response_class=Response)
        app.add_api_route(path, bind(answer), methods=["HEAD"], include_in_schema=False, response_class=Response)


async def _http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "there is no such route", 405: "this route does not take this method"}
    return error_response(HTTPProblem(error.status_code, texts.get(error.status_code, str(error.detail)), headers=error.headers))


async def _problem(_: Request, error: Exception) -> Response:
    return error_response(problem_of(error))


def _error_content() -> Mapping[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFS.format(name="Error")}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The API document, with the structs' schemas in it."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        structs = {kind for *_, request, response in _POSTS for kind in (request, response, native.GenerateParameters) if kind is not None}
        _, schemas = msgspec.json.schema_components(sorted(structs, key=lambda kind: kind.__name__), ref_template=_REFS)
        text = {"type": ["string", "null"]}
        fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
        schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "properties": fields}}}
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        app.openapi_schema = document
    return app.openapi_schema
