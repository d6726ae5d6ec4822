"""`light chat`: a conversation in the terminal with a running server."""

import base64
import sys
from pathlib import Path
from typing import Any

import click

from light_core.cli.http import Server

__all__ = ["chat"]


def chat(
    url: str,
    api_key: str | None,
    model: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    images: tuple[str, ...],
) -> None:
    """Reads lines, prints streamed replies; Ctrl-C stops a reply, Ctrl-D ends."""
    server = Server(url, api_key)
    name = model or server.model()
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    pictures = [_picture(image) for image in images]
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    options = {key: value for key, value in options.items() if value is not None}
    click.echo(f"talking to {name} at {url}; Ctrl-C stops a reply, Ctrl-D ends", err=True)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}] if pictures else text})
        pictures = []
        reply = _reply(server, {"model": name, "messages": messages, "stream": True, **options})
        messages.append({"role": "assistant", "content": reply})


def _picture(path: str) -> dict[str, Any]:
    """The file as a part of a message; the server finds out by itself what kind of picture it is."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:;base64,{data}"}}


def _reply(server: Server, body: dict[str, Any]) -> str:
    """Prints the reply as it comes and returns it, or what there is of it when it is stopped."""
    pieces: list[str] = []
    stream = server.stream("/v1/chat/completions", body)
    try:
        for event in stream:
            for choice in event.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    finally:
        stream.close()  # type: ignore[attr-defined]
    click.echo()
    return "".join(pieces)
