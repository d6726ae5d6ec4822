"""What the processes load if `ProcessSettings` names nothing else: plugins, tokenizer, and the OpenAI server.

Here the process tree meets the rest of core. Imports are late: each process pays for what it uses.
"""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from light_core.config import EngineConfig
from light_core.plugins.refs import PluginRef
from light_core.processes.arena import TAKES_CHAT, TAKES_IDS, TAKES_TEXT
from light_core.processes.client import RemoteEngine
from light_core.processes.guards import Boot
from light_core.processes.http import Lifecycle

if TYPE_CHECKING:
    from light_core.plugins import LoadedPlugins
    from light_core.text.tokenizer import Tokenizer
    from light_core.types import ChatSpec, MediaEncoder

__all__ = ["load_media_encoders", "load_model_tokenizer", "resolve_plugins", "serve_openai"]


def resolve_plugins(config: EngineConfig) -> tuple[tuple[PluginRef, ...], PluginRef | None]:
    """The plugins that may serve `config`, for every process to load the same; and the one that will, where that can be
    told before anything is downloaded. Imports neither torch nor transformers.

    Raises:
        PluginError: a named plugin is missing or broken, or plugins are in conflict.
        ModelError: there is no such model, or no plugin serves it.
    """
    from light_core.plugins import load_plugins

    loaded = load_plugins(config.model_plugin)
    return loaded.refs, _serving_plugin(config, loaded)


def _serving_plugin(config: EngineConfig, loaded: "LoadedPlugins") -> PluginRef | None:
    from light_core.engine.model_files import HUB_ID, resolve_folder
    from light_core.plugins import resolve_bundled, resolve_family

    bundled = resolve_bundled(config.model, loaded)
    if bundled is None and not Path(config.model).is_dir() and HUB_ID.fullmatch(config.model):
        return None
    shipped = {name: Path() for name in loaded.families.bundled} | ({config.model: bundled[1]} if bundled else {})
    folder = resolve_folder(config.model, config.revision, shipped)
    try:
        raw = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return None  # the engine reads it again and says what is wrong with it
    architectures = (raw | dict(config.hf_overrides)).get("architectures") or ()
    return loaded.families.owner(resolve_family(tuple(architectures), loaded)).ref


def load_model_tokenizer(config: EngineConfig, refs: Sequence[PluginRef]) -> "Tokenizer":
    """The tokenizer of the model, or the one that `config.tokenizer` names.

    Raises:
        LightError: the model or its tokenizer cannot be found or read.
    """
    from light_core.plugins import load
    from light_core.text.tokenizer import import_without_torch

    loaded = load(refs)
    import_without_torch()
    return _tokenizer(config, loaded, _model_folder(config, loaded))


def load_media_encoders(config: EngineConfig, refs: Sequence[PluginRef]) -> "tuple[MediaEncoder, ...]":
    """The model's media encoders, to preprocess with.

    Raises:
        LightError: the model cannot be found or read, or a plugin answers wrongly.
    """
    from light_core.plugins import load, media_encoders

    loaded = load(refs)
    return media_encoders(loaded, **_model(config, loaded, _model_folder(config, loaded)))


async def serve_openai(client: RemoteEngine, boot: Boot, listener: socket.socket, lifecycle: Lifecycle) -> None:
    """Serves the OpenAI API: at once with 503 for everything but liveness, in full when the tokenizer is loaded."""
    from light_core.server.app import context_of, create_app
    from light_core.server.serve import serve
    from light_core.server.settings import ServerSettings

    app = create_app(client, None, msgspec.convert(dict(boot.server), ServerSettings))
    context = context_of(app)

    def on_ready() -> None:
        takes = TAKES_TEXT if context.tokenizer is not None else TAKES_IDS
        lifecycle.set_ready(TAKES_CHAT if context.prompts.takes_conversations else takes)

    await serve(
        app,
        [listener],
        prepare=lambda: _load_texts(boot.config, boot.refs),
        on_ready=on_ready,
        draining=lifecycle.draining,
        stopping=lifecycle.stopping,
        handle_signals=False,
    )


def _model_folder(config: EngineConfig, loaded: "LoadedPlugins") -> Path:
    """Where configuration and tokenizer lie; fetched from the hub without the weights if need be."""
    from light_core.engine.model_files import resolve_folder
    from light_core.plugins import bundled_models

    return resolve_folder(config.model, config.revision, bundled_models(loaded), weights=False)


def _tokenizer(config: EngineConfig, loaded: "LoadedPlugins", folder: Path) -> "Tokenizer":
    from light_core.plugins import plugin_tokenizer
    from light_core.text.tokenizer import load_tokenizer

    source, made = Path(config.tokenizer or folder), None
    if source.is_dir() and loaded.manager.hook.light_tokenizer.get_hookimpls():
        made = plugin_tokenizer(loaded, **_model(config, loaded, folder) | {"folder": str(source)})
    return load_tokenizer(config.tokenizer or folder, model_folder=folder, made=made)


def _load_texts(config: EngineConfig, refs: Sequence[PluginRef]) -> "tuple[Tokenizer | None, ChatSpec]":
    """Tokenizer and chat conventions of the model."""
    from light_core.plugins import chat_spec, load
    from light_core.text.tokenizer import import_without_torch
    from light_core.types import ChatSpec

    loaded = load(refs)
    folder = _model_folder(config, loaded)
    # Where no plugin says anything of conversations the model's configuration, whose import takes long, is not needed.
    has_chat = bool(loaded.manager.hook.light_chat.get_hookimpls())
    if has_chat or not config.skip_tokenizer_init:
        import_without_torch()
    chat = chat_spec(loaded, **_model(config, loaded, folder)) if has_chat else ChatSpec()
    return None if config.skip_tokenizer_init else _tokenizer(config, loaded, folder), chat


def _model(config: EngineConfig, loaded: "LoadedPlugins", folder: Path) -> dict[str, Any]:
    """What hooks are asked about in a process that computes nothing: `family`, `config`, `limits` and `folder`."""
    from light_core.engine.model_files import read_config, resolve_max_model_len, text_files
    from light_core.plugins import resolve_family
    from light_core.types import Limits

    files = read_config(folder, config.hf_overrides)
    family = resolve_family(files.architectures, loaded)
    # Conversations and tokenizers depend on the model's length at most.
    max_model_len = resolve_max_model_len(text_files(files, family), config.max_model_len)
    limits = Limits(max_model_len, max_num_seqs=1, max_num_batched_tokens=1)
    return {"family": family, "config": files.config, "limits": limits, "folder": str(folder)}
