"""What clients name as the source of an item: data URLs and files. Addresses are fetched in `fetch.py`.

Error texts are for clients: they hold nothing of a path or an address.
"""

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

from light_core.errors import RequestError
from light_core.media.settings import MediaSettings

__all__ = ["check_source", "read_data_url", "read_file", "scheme_of"]

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII | re.IGNORECASE)
MAX_URL_CHARS = 8192
READ_BYTES = 1 << 20


def scheme_of(url: str) -> str:
    """ "data", "http", "https", "file" or another one, in lower case; "" without."""
    found = SCHEME.match(url)
    return found[1].lower() if found else ""


def check_source(url: str, settings: MediaSettings, param: str) -> None:
    """Refuses at once what will not be read, before it goes to another process.

    Raises:
        RequestError: the scheme is not allowed here, or the text is too long.
    """
    scheme = scheme_of(url)
    if scheme == "data":
        if len(url) > settings.max_media_bytes * 4 // 3 + 1024:
            raise too_large(settings, param)
        return
    if scheme not in ("http", "https", "file"):
        raise RequestError(f"{param}: give a data: URL with base64" + _alternatives(settings), param)
    if len(url) > MAX_URL_CHARS:
        raise RequestError(f"{param}: an address may have {MAX_URL_CHARS} characters", param)
    if scheme == "file" and settings.allowed_local_media_path is None:
        raise RequestError(f"{param}: this server reads no files; give a data: URL" + _alternatives(settings), param)
    if scheme != "file" and not settings.allowed_media_domains:
        raise RequestError(f"{param}: this server fetches no addresses (--allowed-media-domains); give a data: URL", param)


def _alternatives(settings: MediaSettings) -> str:
    return ", or an http(s) address of a host that is allowed here" if settings.allowed_media_domains else ""


def too_large(settings: MediaSettings, param: str) -> RequestError:
    """The error for an item of too many bytes."""
    return RequestError(f"{param}: the item has more than {settings.max_media_bytes} bytes", param)


def read_data_url(url: str, settings: MediaSettings, param: str) -> bytes:
    """The bytes of a data URL in base64; the media type is not believed and not needed.

    Raises:
        RequestError: it is none, or has too many bytes.
    """
    head = DATA_URL.match(url, 0, 256)
    if head is None:
        raise RequestError(f"{param}: a data URL begins with data:image/…;base64,", param)
    encoded = url[head.end() :]
    if len(encoded) * 3 // 4 - 2 > settings.max_media_bytes:
        raise too_large(settings, param)
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{param}: the data URL is not valid base64", param) from None
    if not data:
        raise RequestError(f"{param}: the data URL is empty", param)
    if len(data) > settings.max_media_bytes:
        raise too_large(settings, param)
    return data


def read_file(url: str, settings: MediaSettings, param: str) -> bytes:
    """The bytes of a file below `allowed_local_media_path`. What counts is where the opened file lies, whatever links
    led there. Blocks.

    Raises:
        RequestError: it is not there, not below, no ordinary file, or too large; one text for the first three, so that
            nobody finds out what files there are.
    """
    refused = RequestError(f"{param}: there is no such file that may be read", param)
    if settings.allowed_local_media_path is None:
        raise refused
    rest = url[len("file:") :]
    if not rest.startswith("///"):  # a host, or a path that is relative to who knows what
        raise refused
    path = unquote_to_bytes(rest[2:])
    if b"\0" in path or b"?" in path or b"#" in path:
        raise refused
    try:
        root = Path(settings.allowed_local_media_path).resolve(strict=True)
        if not Path(os.fsdecode(path)).resolve(strict=True).is_relative_to(root):
            raise refused
        # Not blocked by a pipe, and looked at again when it is open: a link may have been changed meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, RuntimeError, ValueError):
        raise refused from None
    try:
        opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not opened.is_relative_to(root):
            raise refused
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(settings.max_media_bytes + 1)
    finally:
        os.close(descriptor)
    if len(data) > settings.max_media_bytes:
        raise too_large(settings, param)
    return data
