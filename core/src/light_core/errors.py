"""Errors that Light raises on purpose.

Every error a user can meet derives from `LightError` and can be shown as three lines: what failed (`error`), the
root cause with the values seen (`cause`), and what to do about it (`try`). Programming errors of ours stay plain
exceptions. Callers: everybody; this module imports nothing of ours.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "LightError",
    "ModelError",
    "OverloadedError",
    "PluginError",
    "RequestError",
]


class LightError(Exception):
    """An error with a cause and a remedy.

    Args:
        error: one line, what could not be done.
        cause: one line, why: the value seen, the values allowed, the plugin and versions involved.
        remedy: one line, what the reader can do; printed after `try:`.
    """

    exit_code = 2

    def __init__(self, error: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(error)
        self.error, self.cause, self.remedy = error, cause, remedy

    def __str__(self) -> str:
        return f"{self.error}: {self.cause}" if self.cause else self.error

    def block(self) -> str:
        """The three lines `error: …`, `cause: …`, `try: …` (an empty one is left out)."""
        rows = (("error", self.error), ("cause", self.cause), ("try", self.remedy))
        return "\n".join(f"{label + ':':<7}{' '.join(text.split())}" for label, text in rows if text)


class ConfigError(LightError):
    """A setting that cannot hold: unknown, out of range, or in conflict with the model or the machine."""


class PluginError(LightError):
    """A plugin that is missing, broken, incompatible or in conflict with another one."""


class ModelError(LightError):
    """A model that cannot be found, read or served (wrong architecture, gated, offline)."""


class CheckpointError(ModelError):
    """A checkpoint whose tensors do not fit the weight plan, or in a format that is refused."""


class RequestError(LightError):
    """A request with a bad value. The server answers 400; nothing else is affected.

    Args:
        error: one line naming the field, the value given and the range allowed.
        param: the request field, as the client spelled it.
    """

    def __init__(self, error: str, param: str | None = None) -> None:
        super().__init__(error)
        self.param = param


class OverloadedError(LightError):
    """The waiting queue is full. The server answers 429 with `Retry-After: retry_after_s`."""

    def __init__(self, error: str, retry_after_s: int = 1) -> None:
        super().__init__(error, remedy=f"send it again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class EngineDeadError(LightError):
    """The engine has stopped; requests in flight cannot be finished."""

    exit_code = 1
