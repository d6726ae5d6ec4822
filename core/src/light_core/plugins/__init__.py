"""Plugins: found without importing them, checked, loaded once, and bound to a frozen model.

    discovery   what is installed, and what of it cannot work        families   who serves which architecture
    checks      API version and version ranges, before importing     binding    hooks' answers to a `ModelRuntime`
    loading     modules to a plugin manager, refs for processes      layout     the rules of a KV layout
    text_model  the text model that a multimodal checkpoint names

After `bind` nothing here runs: the step loop holds the `ModelRuntime`, from which no plugin manager can be reached.
"""

from light_core.plugins.binding import ModelRuntime, bind, chat_spec, describe_machine, media_encoders, plugin_tokenizer
from light_core.plugins.discovery import GROUP, discover
from light_core.plugins.families import Families, bundled_models, resolve_bundled, resolve_family
from light_core.plugins.loading import LoadedPlugins, inspect_plugins, load, load_plugins
from light_core.plugins.monitoring import count_hook_calls
from light_core.plugins.refs import PluginInfo, PluginRef
from light_core.plugins.text_model import read_text_config, resolve_text_family

__all__ = [
    "GROUP",
    "Families",
    "LoadedPlugins",
    "ModelRuntime",
    "PluginInfo",
    "PluginRef",
    "bind",
    "bundled_models",
    "chat_spec",
    "count_hook_calls",
    "describe_machine",
    "discover",
    "inspect_plugins",
    "load",
    "load_plugins",
    "media_encoders",
    "plugin_tokenizer",
    "read_text_config",
    "resolve_bundled",
    "resolve_family",
    "resolve_text_family",
]
