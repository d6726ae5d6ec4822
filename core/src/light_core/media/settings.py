"""Limits of media in requests: one frozen dataclass, built by the command line and passed down."""

from dataclasses import dataclass, fields

from light_core.errors import ConfigError

__all__ = ["MediaSettings"]


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
        decoders: processes that decode at the same time.
        decoder_memory_bytes: what one of them may take beyond its start.
        media_memory_bytes: preprocessed items in shared memory, in use and kept for the next request.
    """

    allowed_media_domains: tuple[str, ...] = ()
    allowed_local_media_path: str | None = None
    max_media_bytes: int = 20 << 20
    max_image_pixels: int = 1 << 25
    max_image_ratio: float = 100.0
    max_image_frames: int = 1
    max_redirects: int = 3
    fetch_timeout_s: float = 10.0
    decode_timeout_s: float = 5.0
    decoders: int = 4
    decoder_memory_bytes: int = 512 << 20
    media_memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("allowed_media_domains", "allowed_local_media_path"):
                continue
            least = 0 if field.name == "max_redirects" else 1 if isinstance(field.default, int) else 1e-3
            if isinstance(value, bool) or not isinstance(value, type(field.default) if isinstance(field.default, int) else (int, float)):
                raise ConfigError(f"{field.name}={value!r} is not usable", "it is a number", f"give {field.name} {least} or more")
            if not least <= value < 1 << 62:
                raise ConfigError(f"{field.name}={value!r} is out of range", "it is a limit", f"give {field.name} {least} or more")
        if wrong := [name for name in self.allowed_media_domains if not name.isascii() or not name.strip() or set(name) & set("/@\\ *?#")]:
            raise ConfigError(
                f"allowed_media_domains: {wrong[0]!r} is no host",
                "an entry is a host or host:port, without scheme or path",
                'give a name such as "images.example.com"; of an international name its xn-- form',
            )
