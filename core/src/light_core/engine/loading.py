"""From an `EngineConfig` to a bound model: plugins, files, device, limits, family. No weights are read here, so that
`light doctor` can go the same way."""

from collections.abc import Sequence
from dataclasses import dataclass

from light_core.config import EngineConfig
from light_core.engine.model_files import (
    ModelFiles,
    read_config,
    require_safetensors,
    resolve_dtype,
    resolve_folder,
    resolve_max_model_len,
    text_files,
)
from light_core.errors import ConfigError, ModelError
from light_core.ops import Machine
from light_core.plugins import (
    LoadedPlugins,
    ModelRuntime,
    PluginRef,
    bind,
    bundled_models,
    load,
    load_plugins,
    resolve_bundled,
    resolve_family,
)
from light_core.types import Family, Limits

__all__ = ["Resolved", "bind_model", "resolve_device", "resolve_model", "resolve_quantization"]

GPU_DEFAULTS = (512, 8192)
OFFLINE_TOKENS, LARGE_GPU_BYTES = 16384, 64 << 30
"""Of a step offline, where nobody waits for its end, on a GPU with so much memory: long prompts go over their prefix half as often."""
CPU_DEFAULTS = (64, 512)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a configuration means on this machine.

    Attributes:
        plugins: loaded.
        files: folder and configuration of the model.
        family: that serves its architecture.
        device: "cpu" or "cuda:0".
        dtype: of parameters and activations.
        limits: bounds of a request and of a step.
        quantization: weight format, or None for plain weights.
    """

    plugins: LoadedPlugins
    files: ModelFiles
    family: Family
    device: str
    dtype: str
    limits: Limits
    quantization: str | None = None


def resolve_device(asked: str) -> str:
    """ "cuda:0" or "cpu".

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    import torch

    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda:0"
    if asked == "cuda":
        cause = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        raise ConfigError("device cuda is not available", cause, "use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES")
    return "cpu"


def resolve_model(
    config: EngineConfig, refs: Sequence[PluginRef] | None = None, device: str | None = None, offline: bool = False
) -> Resolved:
    """Loads the plugins, finds the model and settles device, dtype and limits. Downloads a hub id.

    Args:
        config: what is to be served.
        refs: plugins that another process resolved; None resolves `config.model_plugin` here.
        device: "cpu" or "cuda:0", which need not be there; None finds it by `config.device`.
        offline: only the end of all requests counts.

    Raises:
        LightError: any of it cannot be done; the message says why.
    """
    plugins = load(refs) if refs is not None else load_plugins(config.model_plugin)
    bundled = resolve_bundled(config.model, plugins)
    shipped = {config.model: bundled[1]} if bundled else bundled_models(plugins)
    folder = resolve_folder(config.model, config.revision, shipped, weights=config.load_format != "dummy")
    files = read_config(folder, config.hf_overrides)
    family = resolve_family(files.architectures, plugins)
    if config.load_format != "dummy":
        require_safetensors(config.model, config.revision, folder)
    quantization = resolve_quantization(files, family)
    device = device or resolve_device(config.device)
    text = text_files(files, family)
    limits = _limits(config, resolve_max_model_len(text, config.max_model_len), device, offline)
    return Resolved(plugins, files, family, device, resolve_dtype(text, config.dtype, device), limits, quantization)


def resolve_quantization(files: ModelFiles, family: Family) -> str | None:
    """The weight format that config.json names, or None for plain weights.

    Raises:
        ModelError: the family does not load it.
    """
    named = files.raw.get("quantization_config")
    if not named:
        return None
    method = str(named.get("quant_method", "unknown") if isinstance(named, dict) else "unknown")
    if method not in family.quantization:
        raise ModelError(
            f"the weights are quantised ({method})",
            f"family {family.name!r} loads {', '.join(family.quantization) or 'plain weights only'}",
            "use a checkpoint in bfloat16 or float16",
        )
    return method


def _limits(config: EngineConfig, max_model_len: int, device: str, offline: bool) -> Limits:
    seqs, tokens = GPU_DEFAULTS if device.startswith("cuda") else CPU_DEFAULTS
    if offline and device.startswith("cuda") and _memory_bytes(device) >= LARGE_GPU_BYTES:
        tokens = OFFLINE_TOKENS
    tokens = config.max_num_batched_tokens or tokens
    return Limits(max_model_len, min(config.max_num_seqs or seqs, tokens), tokens)


def _memory_bytes(device: str) -> int:
    """Of the GPU; 0 where it is not there."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0


def bind_model(resolved: Resolved, config: EngineConfig, device: str | None = None, machine: Machine | None = None) -> ModelRuntime:
    """Binds the hooks' answers on the resolved device, or on `device` ("meta": shapes and kernels only), for kernels of
    `machine`; None takes that of the resolved device."""
    from light_core.plugins import describe_machine

    return bind(
        resolved.plugins,
        family=resolved.family,
        config=resolved.files.config,
        dtype=resolved.dtype,
        device=device or resolved.device,
        limits=resolved.limits,
        quantization=resolved.quantization,
        folder=str(resolved.files.folder),
        machine=machine or describe_machine(resolved.device),
        kernels=config.kernels,
        enforce_eager=config.enforce_eager,
    )
