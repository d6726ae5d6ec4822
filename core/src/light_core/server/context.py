"""What every endpoint of one server shares: the engine, the tokenizer, limits, metrics, and the requests that run."""

import functools
import importlib.metadata
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from light_core.server.body import BodyDecoder
from light_core.server.client import EngineClient, EngineState, ModelCard
from light_core.server.errors import HTTPProblem
from light_core.server.metrics import ServerMetrics
from light_core.server.prompts import MediaIntake, PromptReader
from light_core.server.settings import ServerSettings
from light_core.text.tokenizer import Tokenizer
from light_core.types import ChatSpec

if TYPE_CHECKING:
    from light_core.server.replies import Reply

__all__ = ["ServerContext", "light_version", "new_id"]


def light_version() -> str:
    """The version of light-core, or "unknown" where it runs without being installed."""
    try:
        return importlib.metadata.version("light-core")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class ServerContext:
    """One server's parts. Lives on one event loop.

    Attributes:
        draining: set when the server stops taking requests, whatever the engine says.
        pending: set while the tokenizer is still being loaded; the server is LOADING until `attach`.
        replies: generations in flight; each adds and removes itself.
        last_probe: when a load balancer last asked for readiness, by `time.monotonic`; None if never.
    """

    tokenizer: Tokenizer | None
    chat: ChatSpec
    prompts: PromptReader
    sampling_defaults: dict[str, Any]

    def __init__(self, client: EngineClient, tokenizer: Tokenizer | None, settings: ServerSettings, chat: ChatSpec | None = None) -> None:
        self.client, self.settings = client, settings
        self.bodies = BodyDecoder(settings.max_body_bytes)
        self.version = light_version()
        self.metrics = ServerMetrics(client, settings.served_model_names[0], self.version)
        self.created = int(time.time())
        self.draining = self.pending = False
        self.replies: set[Reply] = set()
        self.last_probe: float | None = None
        self.attach(tokenizer, chat)

    def attach(self, tokenizer: Tokenizer | None, chat: ChatSpec | None = None) -> None:
        """Takes the tokenizer, and what the plugin says of conversations; ends `pending`.

        Raises:
            ModelError: the chat template cannot be compiled.
        """
        self.tokenizer, self.chat = tokenizer, chat or ChatSpec()
        self.prompts = PromptReader(tokenizer, self.settings, chat)
        use_defaults = tokenizer is not None and self.settings.generation_config == "auto"
        self.sampling_defaults = dict(tokenizer.generation_defaults) if tokenizer and use_defaults else {}
        self.pending = False

    @property
    def state(self) -> EngineState:
        """The engine's, or DRAINING while this server stops."""
        state = self.client.state
        if self.draining and state is not EngineState.DEAD:
            return EngineState.DRAINING
        return EngineState.LOADING if self.pending and state is EngineState.READY else state

    @property
    def progress(self) -> Mapping[str, Any]:
        """While LOADING: the phase, and how much of it is done where that is known."""
        return {"phase": "tokenizer"} if self.client.state is EngineState.READY else self.client.progress

    def require_ready(self) -> ModelCard:
        """What is served.

        Raises:
            HTTPProblem: 503 with `Retry-After`: loading, draining or dead.
        """
        state = self.state
        if state is EngineState.READY:
            return self.client.card
        messages = {
            EngineState.LOADING: "the model is being loaded",
            EngineState.DRAINING: "the server is shutting down",
            EngineState.DEAD: "the engine has stopped",
        }
        raise HTTPProblem(503, messages[state], code=f"engine_{state.value}", headers={"Retry-After": str(self.settings.retry_after_s)})

    def media_intake(self, salt: str = "") -> MediaIntake:
        """What the model takes beside text, for one request. Only when it is ready."""
        prepare = functools.partial(self.client.prepare_media, salt=salt)
        card = self.client.card
        return MediaIntake(card.media, card.vocab_size, prepare, self.settings.max_media_items)

    def served_name(self, model: str | None) -> str:
        """`model` if it is served; the first served name if it is None.

        Raises:
            HTTPProblem: 404.
        """
        names = self.settings.served_model_names
        if model is None:
            return names[0]
        if model not in names:
            shown = ", ".join(repr(name) for name in names)
            raise HTTPProblem(404, f"the model {model!r:.200} does not exist; served: {shown}", param="model", code="model_not_found")
        return model

    def abort_all(self, problem: HTTPProblem) -> None:
        """Ends every generation in flight with `problem`."""
        for reply in tuple(self.replies):
            reply.fail(problem)


def new_id(prefix: str) -> str:
    """An id such as "chatcmpl-…" that no other request has."""
    return f"{prefix}-{uuid.uuid4().hex}"
