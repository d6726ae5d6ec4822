"""Configuration of an engine: one frozen dataclass, passed down, read from nowhere else.

Not here: the server's settings (`server/settings.py`) and the command line (`cli/`), which build an `EngineConfig`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from light_core.errors import ConfigError

__all__ = ["EngineConfig"]

_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "load_format": ("auto", "safetensors", "dummy"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is to load and how much it may use.

    Attributes:
        model: a local folder, a hub id, or the name of a model that a plugin ships ("demo").
        model_plugin: plugins that may serve it: entry-point names, module paths or file paths, comma separated;
            None finds the family by the `architectures` of the model's config.json.
        tokenizer: folder or hub id of the tokenizer; None takes the model's.
        revision: branch, tag or commit of a hub id.
        dtype: of weights and activations; "auto" takes the checkpoint's on a GPU, and on a CPU bfloat16 only where
            the processor multiplies it in hardware, else float32.
        device: "auto" is the first CUDA device if there is one.
        load_format: "auto" and "safetensors" read the checkpoint; "dummy" fills random weights on the device.
        skip_tokenizer_init: token ids in, token ids out; no tokenizer is loaded.
        max_model_len: prompt and output, in tokens; None takes the model's own limit.
        max_num_seqs: requests that run at the same time; None takes 512 on a GPU, 64 on a CPU.
        max_num_batched_tokens: most tokens of one step (decodes and prefill chunks together); None takes 8192 on a
            GPU, 16384 offline on one of 64 GiB or more, 512 on a CPU. A server's steps have fewer while requests decode, unless
            a queue has formed (docs/decisions/0020).
        max_total_tokens: slots of the KV pool, in tokens; None measures what fits.
        gpu_memory_utilization: share of the GPU's memory that Light may use, 0 to 1.
        enable_prefix_caching: keep the KV of finished requests in the radix tree for later ones.
        media_cache_bytes: embeddings of images that are kept on the device for later requests with the same ones.
        enforce_eager: no CUDA graphs.
        compile_ahead: on a GPU, compile the kernels of the first steps while weights are loaded.
        async_planning: plan step N+1 while step N runs; None means on a GPU only.
        seed: of dummy weights and, in the offline API, of the seeds that requests get which name none; the server draws a
            fresh seed for each of those.
        hf_overrides: entries that replace those of config.json.
        kernels: op name to kernel name, where the automatic choice is to be overruled.
    """

    model: str
    model_plugin: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_total_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    media_cache_bytes: int = 256 << 20
    enforce_eager: bool = False
    compile_ahead: bool = True
    async_planning: bool | None = None
    seed: int = 0
    hf_overrides: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not known", f"allowed: {', '.join(allowed)}", f"set {name} to one of them"
                )
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r} is out of range", "it counts tokens or requests", f"give {name} 1 or more")
        if isinstance(self.media_cache_bytes, bool) or not isinstance(self.media_cache_bytes, int) or self.media_cache_bytes < 0:
            raise ConfigError(f"media_cache_bytes={self.media_cache_bytes!r} is out of range", "it is a size", "give it 0 or more")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization!r} is out of range",
                "it is a share",
                "give it more than 0 and at most 1",
            )

    def replace(self, **changes: Any) -> "EngineConfig":
        """A copy with `changes`; unknown names raise `TypeError`."""
        return dataclasses.replace(self, **changes)
