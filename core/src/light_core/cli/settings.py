"""How every setting is spelled and explained on the command line. Types and defaults come from the dataclasses."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from light_core.cli.options import split
from light_core.config import EngineConfig
from light_core.media.settings import MediaSettings
from light_core.processes.settings import ProcessSettings
from light_core.server.settings import ServerSettings

if TYPE_CHECKING:
    from light_core.llm import LLM

__all__ = [
    "ENGINE_CHOICES",
    "ENGINE_HELP",
    "SECTIONS",
    "create_llm",
    "engine_config",
    "process_settings",
    "server_options",
    "server_settings",
]

ENGINE_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "load_format": ("auto", "safetensors", "dummy"),
}

ENGINE_HELP = {
    "model_plugin": "Plugins that may serve it: names, modules or files, comma separated; found by the model's architecture otherwise.",
    "tokenizer": "Folder or hub id of the tokenizer; the model's own otherwise.",
    "revision": "Branch, tag or commit of a hub id.",
    "dtype": "Of weights and activations.",
    "device": "Where to run.",
    "skip_tokenizer_init": "Token ids in, token ids out.",
    "load_format": '"dummy" fills random weights, to measure without a checkpoint.',
    "max_model_len": "Prompt and output of one request, in tokens; the model's own limit otherwise.",
    "max_num_seqs": "Requests that run at the same time; 512 on a GPU, 64 on a CPU otherwise.",
    "max_num_batched_tokens": "Most tokens of one step, decodes and prefill chunks together; 8192 on a GPU, 512 on a CPU otherwise.",
    "max_total_tokens": "Size of the KV pool, in tokens; measured otherwise.",
    "gpu_memory_utilization": "Share of the GPU's memory that may be used.",
    "enable_prefix_caching": "Keep the KV of finished requests for later ones with the same beginning.",
    "media_cache_bytes": "Embeddings of images that are kept on the device for later requests.",
    "enforce_eager": "No CUDA graphs.",
    "compile_ahead": "Compile kernels while weights are loaded, not when they are first launched.",
    "seed": "Of dummy weights, and offline of requests that name none.",
    "hf_overrides": "JSON object whose entries replace those of config.json.",
    "kernels": 'JSON object of op to kernel that overrules the automatic choice: {"attention": "reference"}.',
}

SERVER_FLAGS: dict[str, tuple[str, Any, str]] = {
    "host": ("host", str, "Address to listen on."),
    "port": ("port", int, "Port to listen on; 0 takes a free one."),
    "served-model-name": ("served_model_names", str, "Name in requests and answers; may be repeated. The model's own name otherwise."),
    "api-key": ("api_keys", str, "Key that clients must send; may be repeated."),
    "allowed-origins": ("allowed_origins", str, 'Origin that browsers may call from, or "*"; may be repeated.'),
    "chat-template": ("chat_template", str, "File with a Jinja chat template that replaces the tokenizer's."),
    "generation-config": ("generation_config", str, '"auto" takes sampling defaults from the model, "none" does not.'),
    "max-queued-requests": ("max_queued", int, "Outputs that may wait; further requests are answered 429."),
    "max-body-bytes": ("max_body_bytes", int, "Longest request body."),
    "max-logprobs": ("max_logprobs", int, "Most likely tokens that a request may ask for."),
    "max-media-items": ("max_media_items", int, "Images of a request."),
    "max-media-bytes": ("max_media_bytes", int, "Bytes of an image file."),
    "max-image-pixels": ("max_image_pixels", int, "Width times height of an image."),
    "max-image-ratio": ("max_image_ratio", float, "Longer side of an image to its shorter one."),
    "max-image-frames": ("max_image_frames", int, "Frames of an image file, of which the first is what a model sees."),
    "allowed-media-domains": (
        "allowed_media_domains",
        str,
        'Host, or host:port, that image_url may name; may be repeated. Without one only "data:" URLs are taken.',
    ),
    "allowed-local-media-path": ("allowed_local_media_path", str, 'Folder that "file://" addresses may read from.'),
    "media-fetch-timeout": ("fetch_timeout_s", float, "Seconds that fetching an image may take."),
    "media-decoders": ("decoders", int, "Processes that decode images; as suits the machine where none is given."),
    "media-memory-bytes": ("media_memory_bytes", int, "Shared memory for preprocessed images, in use and kept."),
    "drain-delay": ("drain_delay_s", float, "Seconds that a stopping server goes on answering 503 before it closes its port."),
    "shutdown-timeout": ("shutdown_timeout_s", float, "Seconds that requests in flight may go on when the server stops."),
    "watchdog-timeout": ("watchdog_timeout_s", float, "Seconds without a step, while there is work, after which the server ends."),
    "stats-interval": ("stats_interval_s", float, "Seconds between two throughput lines."),
}
SECTIONS: dict[str, tuple[str, ...]] = {
    "Model": (
        "model_plugin",
        "tokenizer",
        "skip_tokenizer_init",
        "revision",
        "load_format",
        "dtype",
        "device",
        "max_model_len",
        "hf_overrides",
        "seed",
    ),
    "Engine": (
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_total_tokens",
        "gpu_memory_utilization",
        "enable_prefix_caching",
        "media_cache_bytes",
        "enforce_eager",
        "compile_ahead",
        "kernels",
    ),
    "Server": ("host", "port", "served_model_names", "api_keys", "allowed_origins", "chat_template", "generation_config"),
    "Limits of requests": ("max_queued", "max_body_bytes", "max_logprobs"),
    "Images": (
        "allowed_media_domains",
        "allowed_local_media_path",
        "max_media_items",
        "max_media_bytes",
        "max_image_pixels",
        "max_image_ratio",
        "max_image_frames",
        "fetch_timeout_s",
        "decoders",
        "media_memory_bytes",
    ),
    "Operation": ("drain_delay_s", "shutdown_timeout_s", "watchdog_timeout_s", "stats_interval_s"),
}
"""Headings of the help, with the names of the options under each."""
_REPEATED = ("served_model_names", "api_keys", "allowed_origins", "allowed_media_domains")


def server_options() -> list[click.Option]:
    """Options of the server and its processes."""
    defaults = {
        field.name: field.default for kind in (ServerSettings, ProcessSettings, MediaSettings) for field in dataclasses.fields(kind)
    }
    options = []
    for flag, (name, kind, text) in SERVER_FLAGS.items():
        repeated = name in _REPEATED
        env = "LIGHT_" + flag.replace("-", "_").upper()
        default = None if repeated else defaults[name]
        shown = default is not None
        options.append(
            click.Option(
                ["--" + flag, name],
                type=kind,
                default=default,
                multiple=repeated,
                envvar=env,
                show_default=shown,
                help=text,
            )
        )
    return options


def engine_config(model: str, values: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration out of parsed options."""
    return EngineConfig(model=model, **split({**values, "model": None}, EngineConfig))


def create_llm(config: EngineConfig) -> "LLM":
    """The offline API over `config`; imports torch."""
    from light_core.llm import LLM

    return LLM(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def server_settings(model: str, values: Mapping[str, Any]) -> ServerSettings:
    """The HTTP server's settings out of parsed options; the model's own name where none is given."""
    given = split(values, ServerSettings)
    names = given.pop("served_model_names", None) or (model.rstrip("/"),)
    template = given.pop("chat_template", None)
    return ServerSettings(served_model_names=tuple(names), chat_template=_template(template), **given)


def process_settings(values: Mapping[str, Any]) -> ProcessSettings:
    """The process tree's settings out of parsed options."""
    return ProcessSettings(**split(values, ProcessSettings), media=MediaSettings(**split(values, MediaSettings)))


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", param_hint="--chat-template") from error
