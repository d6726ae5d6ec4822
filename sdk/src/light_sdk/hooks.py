"""The SDK as a plugin: it declares the shared ops and offers their kernels. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from light_core.hookspecs import hookimpl
from light_core.ops import Kernel, KernelRegistry

__all__ = ["light_api", "light_register_kernels"]

light_api = 1

FLOATS = ("float32", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")
MAX_HEAD_DIM = 256
MAX_DENSE_HEAD_DIM = 128
TRITON_OPS = ("rms_norm", "layer_norm", "rotary", "write_kv", "act_and_mul", "activation", "attention")
CPU_OPS = ("layer_norm", "attention")


@hookimpl
def light_register_kernels(registry: KernelRegistry) -> None:
    """Declares every op of `light_sdk.ops`; `linear` has no kernel beside its reference, which is torch's own."""
    for op in ("linear", *TRITON_OPS):
        registry.op(op, reference=f"light_sdk.ops.{op}.reference:{op}")
    for op in TRITON_OPS:
        accepts = _accepts_attention if op == "attention" else None
        registry.kernel(
            Kernel(op, "triton", f"light_sdk.ops.{op}.kernel:{op}", ("cuda",), min_capability=(8, 0), dtypes=FLOATS, accepts=accepts)
        )
    hopper = "light_sdk.ops.attention.hopper:attention"
    registry.kernel(Kernel("attention", "triton+cudnn", hopper, ("cuda",), (9, 0), HALVES, priority=10, accepts=_accepts_dense))
    for op in CPU_OPS:
        registry.kernel(Kernel(op, "torch-cpu", f"light_sdk.ops.{op}.cpu:{op}", ("cpu",), dtypes=FLOATS))


def _accepts_dense(facts: Mapping[str, Any]) -> str | None:
    """None if cuDNN serves these heads, else why not."""
    if facts.get("alibi") or facts.get("window") is not None:
        return "takes neither ALiBi nor a window"
    if facts.get("head_dim", 1) % 8 or facts.get("head_dim", 1) > MAX_DENSE_HEAD_DIM:
        return f"takes head_dim in eights up to {MAX_DENSE_HEAD_DIM}, not {facts.get('head_dim')}"
    return _accepts_attention(facts)


def _accepts_attention(facts: Mapping[str, Any]) -> str | None:
    """None if the Triton kernels serve these heads, else why not."""
    head_dim, num_heads, num_kv_heads = (facts.get(name, 1) for name in ("head_dim", "num_heads", "num_kv_heads"))
    if head_dim > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    if num_heads % num_kv_heads:
        return f"takes query heads in equal groups, not {num_heads} over {num_kv_heads}"
    return None
