"""How large the KV pool can be: the arithmetic, measured and printed."""

from dataclasses import dataclass

import psutil

from light_core.errors import ConfigError

__all__ = ["MemoryBudget", "cpu_budget", "pool_slots"]

GIB = 2**30
CPU_SHARE = 0.25
CPU_MOST_BYTES = 4 * GIB
CUDA_SLACK_BYTES = 256 * 2**20  # fragmentation of the allocator and library workspaces made later


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes on the device, and what is left for KV.

    Attributes:
        total: of the device; on a CPU, what is available.
        usable: what Light may use of it.
        weights: parameters and everything else that stays.
        activations: peak of one step of the full token budget.
        graphs: CUDA graphs.
        media: embeddings that are kept.
    """

    total: int
    usable: int
    weights: int
    activations: int = 0
    graphs: int = 0
    media: int = 0

    @property
    def kv(self) -> int:
        """Bytes left for the KV pool."""
        return self.usable - self.weights - self.activations - self.graphs - self.media

    def __str__(self) -> str:
        media = f" + media {self.media / GIB:.2f}" if self.media else ""
        return (
            f"{self.total / GIB:.2f} GiB, usable {self.usable / GIB:.2f} = weights {self.weights / GIB:.2f} + activations "
            f"{self.activations / GIB:.2f} + graphs {self.graphs / GIB:.2f}{media} + KV {self.kv / GIB:.2f}"
        )


def cpu_budget(weights: int = 0) -> MemoryBudget:
    """On a CPU: a quarter of the available memory for KV, at most 4 GiB.

    Args:
        weights: bytes of parameters that are not in memory yet.

    Raises:
        ConfigError: they do not fit in what is available.
    """
    available = psutil.virtual_memory().available
    if weights > available:
        raise ConfigError(
            "the weights do not fit in memory",
            f"they take {weights / GIB:.2f} GiB, available are {available / GIB:.2f} GiB",
            "use a smaller model, or --dtype bfloat16",
        )
    kv = min(int((available - weights) * CPU_SHARE), CPU_MOST_BYTES)
    return MemoryBudget(available, kv + weights, weights)


def pool_slots(budget: MemoryBudget, token_bytes: int, asked: int | None, max_model_len: int, max_num_seqs: int) -> int:
    """Slots of the KV pool: `asked`, or as many as fit and could ever be used. One more is kept for padding.

    Raises:
        ConfigError: not even one request of `max_model_len` fits; with the numbers.
    """
    useful = max_model_len * max_num_seqs
    fitting = useful if token_bytes == 0 else max(budget.kv, 0) // token_bytes
    slots = asked if asked is not None else min(fitting, useful)
    if asked is not None and asked > fitting:
        raise ConfigError(
            f"a KV pool of {asked} tokens does not fit",
            f"{asked} x {token_bytes} bytes is {asked * token_bytes / GIB:.2f} GiB, free for KV are {budget.kv / GIB:.2f} GiB",
            f"give --max-total-tokens {fitting} or less",
        )
    if slots < max_model_len:
        raise ConfigError(
            f"the KV pool holds {slots} tokens, one request may have {max_model_len}",
            f"a token takes {token_bytes} bytes; {budget}",
            f"give --max-model-len {max(slots, 1)} or less, or "
            + ("a higher --gpu-memory-utilization" if asked is None else f"--max-total-tokens {max_model_len} or more"),
        )
    return int(slots) + 1
