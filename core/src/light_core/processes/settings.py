"""Settings of the process tree: sizes, bounds and deadlines. Not here: what the engine loads, what HTTP allows."""

from dataclasses import dataclass, fields

from light_core.errors import ConfigError
from light_core.media.settings import MediaSettings

__all__ = ["ProcessSettings"]

MAX_SLOTS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSettings:
    """How `light serve` runs its processes.

    Attributes:
        host, port: where HTTP listens; port 0 takes a free one.
        num_slots: outputs that can be alive at the same time, running or waiting.
        max_queued: outputs that may wait for the engine; more are refused with `OverloadedError`.
        max_message_bytes: longest message between processes; longer ones are dropped.
        shutdown_timeout_s: how long requests in flight may go on after SIGTERM.
        watchdog_timeout_s: a step that takes longer, or an engine silent for longer, ends the server.
        heartbeat_timeout_s: an engine silent for longer is not ready.
        stats_interval_s: between two throughput lines, while there is work.
        max_http_restarts: crashes of the HTTP process within 60 s that are mended by a restart.
        engine: "module:callable" that builds the engine: `(config, refs, progress) -> engine`.
        tokenizer: "module:callable" that loads the tokenizer: `(config, refs) -> tokenizer`.
        media_encoders: "module:callable" that tells the media process of the model's encoders: `(config, refs) -> encoders`.
        media: where media may come from, and how much of it.
        server: "module:callable" of the HTTP side: `async (client, boot, listener, lifecycle) -> None`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    num_slots: int = 4096
    max_queued: int = 2048
    max_message_bytes: int = 64 << 20
    shutdown_timeout_s: float = 30.0
    watchdog_timeout_s: float = 120.0
    heartbeat_timeout_s: float = 2.0
    stats_interval_s: float = 5.0
    max_http_restarts: int = 5
    engine: str = "light_core.engine.engine:Engine"
    tokenizer: str = "light_core.processes.defaults:load_model_tokenizer"
    media_encoders: str = "light_core.processes.defaults:load_media_encoders"
    media: MediaSettings = MediaSettings()  # noqa: RUF009  # frozen
    server: str = "light_core.processes.defaults:serve_openai"

    def __post_init__(self) -> None:
        bounds = {"port": (0, 65535), "num_slots": (1, MAX_SLOTS), "max_queued": (0, MAX_SLOTS), "max_message_bytes": (1 << 16, 1 << 31)}
        bounds["max_http_restarts"] = (0, 1000)
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    f"{name}={value!r} is out of range", f"allowed: {low} to {high}", f"give {name} a whole number in that range"
                )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and not (isinstance(value, (int, float)) and 0 <= value < 1e9):
                raise ConfigError(f"{field.name}={value!r} is out of range", "it is a time in seconds", f"give {field.name} 0 or more")
