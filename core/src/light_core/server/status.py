"""Routes that tell about the server: probes, models, version, metrics, and what is here."""

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from light_core.server.client import EngineState
from light_core.server.context import ServerContext
from light_core.server.events import encode
from light_core.server.schema import ModelEntry, ModelList

__all__ = ["health", "index", "live", "metrics", "models", "version"]


def live() -> Response:
    """200 while the event loop answers, whatever the engine does."""
    return _json({"status": "ok"})


def health(context: ServerContext) -> Response:
    """200 if a request would be taken now, else 503 and why."""
    context.last_probe = time.monotonic()
    state = context.state
    if state is EngineState.READY:
        return _json({"status": "ok"})
    body: dict[str, Any] = {"status": state.value}
    if state is EngineState.LOADING:
        body.update(context.progress)
    return _json(body, 503, {"Retry-After": str(context.settings.retry_after_s)})


def models(context: ServerContext) -> Response:
    """The served names, with the limit of tokens and the plugin that serves."""
    card = context.require_ready()
    names = context.settings.served_model_names
    entries = [
        ModelEntry(
            id=name,
            created=context.created,
            root=str(card.info.get("model", names[0])),
            max_model_len=card.max_model_len,
            vocab_size=card.vocab_size,
            plugin=card.plugin,
        )
        for name in names
    ]
    return Response(encode(ModelList(data=entries)), media_type="application/json")


def version(context: ServerContext) -> Response:
    """The version of light-core."""
    return _json({"version": context.version})


def metrics(context: ServerContext) -> Response:
    """Prometheus' text format."""
    return Response(context.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def index(context: ServerContext, routes: Mapping[str, str]) -> Response:
    """What is served and where."""
    return _json({"name": "light", "version": context.version, "models": context.settings.served_model_names, "routes": routes})


def _json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers=headers, media_type="application/json")
