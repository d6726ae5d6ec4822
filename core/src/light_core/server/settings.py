"""Settings of the HTTP server: one frozen dataclass, built by the command line, passed down, read from nowhere else."""

from dataclasses import dataclass

from light_core.errors import ConfigError

__all__ = ["ServerSettings"]

_POSITIVE = [
    "max_body_bytes",
    "max_header_bytes",
    "max_header_count",
    "header_timeout_s",
    "body_timeout_s",
    "keep_alive_timeout_s",
    "write_timeout_s",
    "max_connections",
    "max_prompts",
    "max_outputs",
    "max_messages",
    "max_media_items",
    "max_logprobs",
    "tokenizer_threads",
    "max_pending_tokenizations",
    "template_timeout_s",
    "retry_after_s",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the HTTP server offers and how much a client may ask of it.

    Attributes:
        served_model_names: names that requests may use in `model`; the first stands for a request that names none.
        api_keys: any of them opens the server (`Authorization: Bearer …`); empty asks for none.
        allowed_origins: origins that browsers may call from (CORS), "*" for any; empty allows none.
        chat_template: Jinja source that replaces the tokenizer's.
        generation_config: "auto" takes sampling defaults from the model's generation_config.json, "none" the API's own.
        max_body_bytes: of a request's body.
        max_header_bytes, max_header_count: of a request's head.
        header_timeout_s: from the first chance to send a head until it is complete.
        body_timeout_s: from the head until the body is complete.
        keep_alive_timeout_s: idle time between two requests of a connection.
        write_timeout_s: a client that reads nothing for so long is dropped.
        max_connections: open at the same time.
        max_prompts, max_outputs: of one request: prompts, and prompts times `n`.
        max_messages: of one conversation.
        max_media_items: images of one request, where the model takes any.
        max_logprobs: likeliest tokens returned at a position.
        tokenizer_threads: threads that tokenise and render chat templates.
        max_pending_tokenizations: requests that may wait for such a thread; further ones are answered 429.
        template_timeout_s: deadline of rendering one conversation.
        drain_delay_s: how long a stopping server still accepts connections (and answers 503), so that load balancers
            take it out first.
        shutdown_timeout_s: how long requests in flight may go on after that.
        retry_after_s: the `Retry-After` of 503 answers.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    generation_config: str = "auto"
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 16 << 10
    max_header_count: int = 128
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    keep_alive_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_connections: int = 10_000
    max_prompts: int = 1024
    max_outputs: int = 1024
    max_messages: int = 4096
    max_media_items: int = 32
    max_logprobs: int = 20
    tokenizer_threads: int = 4
    max_pending_tokenizations: int = 1024
    template_timeout_s: float = 5.0
    drain_delay_s: float = 5.0
    shutdown_timeout_s: float = 30.0
    retry_after_s: int = 5

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("there is no served model name", f"served_model_names={self.served_model_names!r}", "give one name or more")
        if not all(key.isascii() and key.strip() == key and key for key in self.api_keys):
            raise ConfigError("an API key is not usable", "keys are non-empty ASCII without blanks around them", "give another --api-key")
        if self.generation_config not in ("auto", "none"):
            raise ConfigError(f"generation_config={self.generation_config!r} is not known", "allowed: auto, none", "set it to one of them")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is out of range", "it must be over 0", f"raise {name}")
        for name in ("drain_delay_s", "shutdown_timeout_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is out of range", "it is a time", f"give {name} 0 or more")
