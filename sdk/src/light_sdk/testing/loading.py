"""A model folder, bound through the real plugin loader and filled with its weights, for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from light_core.engine.loading import resolve_quantization
from light_core.engine.model_files import read_config
from light_core.engine.weights import load_weights
from light_core.ops import Machine
from light_core.plugins import ModelRuntime, bind, load_plugins, resolve_family
from light_core.types import Limits

__all__ = ["load_model"]

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 8, 512


def load_model(
    folder: str | Path,
    plugins: Sequence[str],
    dtype: str = "float32",
    device: str = "cpu",
    max_model_len: int = 64,
    machine: Machine | None = None,
    kernels: Mapping[str, str] = MappingProxyType({}),
) -> ModelRuntime:
    """Binds the model in `folder` and loads its weights.

    Args:
        folder: config.json and safetensors.
        plugins: module paths of the plugins to load beside core and sdk.
        dtype: of parameters and activations.
        device: "cpu" or "cuda".
        max_model_len: tokens of one request.
        machine: that kernels are chosen for; None is that of `device`.
        kernels: op to the name of the kernel that must serve it.

    Raises:
        LightError: what the loader, the binding or the weights say.
    """
    loaded = load_plugins(",".join(("light_sdk.hooks", *plugins)))
    files = read_config(Path(folder), {})
    family = resolve_family(files.architectures, loaded)
    runtime = bind(
        loaded,
        family=family,
        config=files.config,
        dtype=dtype,
        device=device,
        limits=Limits(max_model_len, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS),
        quantization=resolve_quantization(files, family),
        folder=str(folder),
        machine=machine,
        kernels=kernels,
    )
    load_weights(runtime.modules, runtime.weight_plan, folder, device)
    return runtime
