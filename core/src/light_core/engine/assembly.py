"""A bound model, its sampler and its encoders as one runner. Callers: the engine, and `rehearsal.py`, which runs the same
without memory."""

import torch

from light_core.config import EngineConfig
from light_core.engine.loading import Resolved
from light_core.engine.media import EngineMedia
from light_core.engine.runner import ModelRunner
from light_core.engine.sampling import Sampler
from light_core.ops import Choice, Machine, OpTable
from light_core.plugins import ModelRuntime, describe_machine
from light_core.plugins.loading import create_kernel_registry

__all__ = ["create_runner", "vocab_size"]


def create_runner(
    runtime: ModelRuntime, resolved: Resolved, config: EngineConfig, machine: Machine | None = None
) -> tuple[ModelRunner, tuple[Choice, ...]]:
    """The runner of `runtime`, without KV memory, and which kernels the sampler chose.

    Args:
        runtime: bound.
        resolved, config: what it was bound by.
        machine: where the sampler's kernels run; None takes it from the device.
    """
    limits, size = resolved.limits, vocab_size(runtime)
    # A table of the sampler's own: the model's is frozen when it is bound.
    ops = OpTable(create_kernel_registry(resolved.plugins), machine or describe_machine(resolved.device), resolved.dtype, config.kernels)
    sampler = Sampler(ops, limits.max_num_seqs, size, resolved.device)
    media = None
    if runtime.media_encoders:
        device = torch.device(resolved.device)
        media = EngineMedia(runtime.media_encoders, size, device, limits.max_num_batched_tokens, config.media_cache_bytes)
    runner = ModelRunner(runtime, sampler, not config.enforce_eager, groups_decodes=config.enable_prefix_caching, media=media)
    return runner, ops.freeze()


def vocab_size(runtime: ModelRuntime) -> int:
    """V, the width of the logits."""
    config = runtime.model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)
