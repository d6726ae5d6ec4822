"""What the processes load if `ProcessSettings` names nothing else: plugins, tokenizer, and the OpenAI server.

Here the process tree meets the rest of core. Imports are late: each process pays for what it uses.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec

from light_core.config import EngineConfig
from light_core.plugins.refs import PluginRef
from light_core.processes.client import RemoteEngine
from light_core.processes.guards import Boot
from light_core.processes.http import Lifecycle

if TYPE_CHECKING:
    from fastapi import FastAPI

    from light_core.plugins import LoadedPlugins
    from light_core.text.tokenizer import Tokenizer
    from light_core.types import ChatSpec

T = TypeVar("T")

__all__ = ["load_model_tokenizer", "resolve_plugins", "serve_openai"]


def resolve_plugins(config: EngineConfig) -> tuple[PluginRef, ...]:
    """The plugins that may serve `config`, for every process to load the same.

    Raises:
        PluginError: a named plugin is missing or broken, or plugins are in conflict.
    """
    from light_core.plugins import load_plugins

    return load_plugins(config.model_plugin).refs


def load_model_tokenizer(config: EngineConfig, refs: Sequence[PluginRef]) -> "Tokenizer":
    """The tokenizer of the model, or the one that `config.tokenizer` names.

    Raises:
        LightError: the model or its tokenizer cannot be found or read.
    """
    from light_core.plugins import load

    return _tokenizer(config, _model_folder(config, load(refs)))


async def serve_openai(client: RemoteEngine, boot: Boot, listener: socket.socket, lifecycle: Lifecycle) -> None:
    """Serves the OpenAI API: at once with 503 for everything but liveness, in full when the tokenizer is loaded."""
    from light_core.server.app import create_app
    from light_core.server.settings import ServerSettings

    settings = msgspec.convert(dict(boot.server), ServerSettings)
    client.held = True
    loaded = asyncio.Event()
    texts = _in_background(lambda: _load_texts(boot.config, boot.refs))
    texts.add_done_callback(lambda _: loaded.set())
    await _run(create_app(client, None, settings), listener.dup(), lifecycle, loaded)
    if lifecycle.stopping.is_set() or lifecycle.draining.is_set():
        return
    tokenizer, chat = await texts
    client.held = False
    await _run(create_app(client, tokenizer, settings, chat), listener, lifecycle, None)


async def _run(app: "FastAPI", listener: socket.socket, lifecycle: Lifecycle, until: asyncio.Event | None) -> None:
    """Serves `app` until the supervisor ends it, or `until` is set; then no request is in flight."""
    from light_core.server.serve import HTTPServer

    server = HTTPServer(app)

    async def watch() -> None:
        await _any_of(lifecycle.draining, lifecycle.stopping, *([until] if until is not None else []))
        if until is not None:
            server.should_exit = True
            return
        server.begin_drain()
        await lifecycle.stopping.wait()
        server.begin_drain()

    watching = asyncio.create_task(watch())
    try:
        await server.serve([listener])
    finally:
        watching.cancel()


def _in_background(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Runs `work` in a thread that, unlike an executor's, does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, problem)

    threading.Thread(target=run, name="texts", daemon=True).start()
    return future


async def _any_of(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _model_folder(config: EngineConfig, loaded: "LoadedPlugins") -> Path:
    """Where configuration and tokenizer lie; fetched from the hub without the weights if need be."""
    from light_core.engine.model_files import resolve_folder
    from light_core.plugins import bundled_models

    return resolve_folder(config.model, config.revision, bundled_models(loaded), weights=False)


def _tokenizer(config: EngineConfig, folder: Path) -> "Tokenizer":
    from light_core.text.tokenizer import load_tokenizer

    return load_tokenizer(config.tokenizer or folder, model_folder=folder)


def _load_texts(config: EngineConfig, refs: Sequence[PluginRef]) -> "tuple[Tokenizer | None, ChatSpec]":
    """Tokenizer and chat conventions of the model."""
    from light_core.engine.model_files import read_config, resolve_max_model_len
    from light_core.plugins import chat_spec, load, resolve_family
    from light_core.types import Limits

    loaded = load(refs)
    folder = _model_folder(config, loaded)
    files = read_config(folder, config.hf_overrides)
    # Nothing is computed here: conversations depend on the model's length at most.
    limits = Limits(resolve_max_model_len(files, config.max_model_len), max_num_seqs=1, max_num_batched_tokens=1)
    family = resolve_family(files.architectures, loaded)
    chat = chat_spec(loaded, family=family, config=files.config, limits=limits, folder=str(folder))
    return None if config.skip_tokenizer_init else _tokenizer(config, folder), chat
