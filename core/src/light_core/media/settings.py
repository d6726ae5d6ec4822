"""Limits of media in requests: one frozen dataclass, built by the command line and passed down."""

import os
from dataclasses import dataclass, fields

from light_core.errors import ConfigError

__all__ = ["MediaSettings"]


MAX_IMAGE_PIXELS = 1 << 34
"""Decoders have addresses for so many, and memory as it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSettings:
    """Where media may come from, and how much of it a client may ask for.

    Attributes:
        allowed_media_domains: hosts that http(s) addresses may name, "host" (ports 80 and 443) or "host:port"; empty
            refuses addresses. An entry that is an IP address allows just that one, public or not.
        allowed_local_media_path: folder that `file://` addresses may lead into; None refuses them.
        max_media_bytes: of one item, as the client or its host sends it.
        max_image_pixels: width times height.
        max_image_ratio: longer side to shorter side.
        max_image_frames: frames of one file; the first is what the model sees.
        max_redirects: of one address.
        fetch_timeout_s: from the look-up of a host to the last byte.
        decode_timeout_s: of one item.
        decoders: processes that decode at the same time; None takes half of the processors, 2 to 16.
        decoder_memory_bytes: what one of them may take beyond its start.
        media_memory_bytes: preprocessed items in shared memory, in use and kept for the next request.
    """

    allowed_media_domains: tuple[str, ...] = ()
    allowed_local_media_path: str | None = None
    max_media_bytes: int = 20 << 20
    max_image_pixels: int = 1 << 25
    max_image_ratio: float = 200.0
    max_image_frames: int = 1
    max_redirects: int = 3
    fetch_timeout_s: float = 10.0
    decode_timeout_s: float = 5.0
    decoders: int | None = None
    decoder_memory_bytes: int = 512 << 20
    media_memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("allowed_media_domains", "allowed_local_media_path") or (field.name == "decoders" and value is None):
                continue
            is_real = isinstance(field.default, float)
            least = 0 if field.name == "max_redirects" else 1e-3 if is_real else 1
            if isinstance(value, bool) or not isinstance(value, (int, float) if is_real else int):
                raise ConfigError(f"{field.name}={value!r} is not usable", "it is a number", f"give {field.name} {least} or more")
            most = MAX_IMAGE_PIXELS if field.name == "max_image_pixels" else 1 << 62
            if not least <= value <= most:
                raise ConfigError(f"{field.name}={value!r} is out of range", "it is a limit", f"give {field.name} {least} to {most}")
        if wrong := [name for name in self.allowed_media_domains if not name.isascii() or not name.strip() or set(name) & set("/@\\ *?#")]:
            raise ConfigError(
                f"allowed_media_domains: {wrong[0]!r} is no host",
                "an entry is a host or host:port, without scheme or path",
                'give a name such as "images.example.com"; of an international name its xn-- form',
            )

    @property
    def num_decoders(self) -> int:
        """`decoders`, or as many as suit this machine."""
        return self.decoders or min(max(len(os.sched_getaffinity(0)) // 2, 2), 16)
