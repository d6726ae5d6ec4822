"""Finds code that gets media by itself: a plugin is given bytes, and never opens a path or an address for them.

A model's own code that fetches what a request names is a hole in every check that the server makes (files outside of the
allowed folder, addresses of the internal network). Called by the conformance kit.
"""

import ast
from pathlib import Path

__all__ = ["find_openings", "openings_of_package"]

NETWORK = frozenset(
    ["aiohttp", "ftplib", "http.client", "httpx", "pycurl", "requests", "socket", "urllib.request", "urllib3", "websockets", "yt_dlp"]
)
READERS = frozenset(
    [
        "cv2.VideoCapture",
        "cv2.imread",
        "decode_image",
        "fetch_image",
        "fetch_video",
        "imageio.imread",
        "iio.imread",
        "librosa.load",
        "load_audio",
        "load_image",
        "load_video",
        "read_image",
        "read_video",
        "soundfile.read",
        "torchaudio.load",
    ]
)
"""Functions of image, video and audio libraries that take a path or an address."""


def find_openings(tree: ast.AST) -> list[str]:
    """What `tree` imports or calls to get media, as "line: what"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {alias.name}" for alias in node.names if _is_network(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(map(_is_network, names)):
                found.append(f"{node.lineno}: from {node.module} import")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in READERS or name.rpartition(".")[2] in READERS:
                found.append(f"{node.lineno}: {name}(…)")
            elif name in ("Image.open", "PIL.Image.open") and not _is_buffer(node.args[0] if node.args else None):
                found.append(f"{node.lineno}: {name} of something else than BytesIO(…)")
    return found


def openings_of_package(folder: Path) -> dict[str, list[str]]:
    """File below `folder` to what it does."""
    files = {path: find_openings(ast.parse(path.read_text())) for path in sorted(folder.rglob("*.py"))}
    return {str(path.relative_to(folder)): found for path, found in files.items() if found}


def _is_network(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NETWORK)


def _is_buffer(argument: ast.expr | None) -> bool:
    return isinstance(argument, ast.Call) and ast.unparse(argument.func).rpartition(".")[2] == "BytesIO"
