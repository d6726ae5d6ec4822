"""The SDK as a plugin: it declares the shared ops and offers their kernels. Imports no torch."""

import platform
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
MAX_LATENT_RANK = 512
SPLIT_HEAD_DIM = 80
TRITON_OPS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "write_kv",
    "rotary_kv",
    "act_and_mul",
    "activation",
    "attention",
    "write_latent",
    "mla_attention",
    "latent_attention",
    "route_experts",
    "route_tokens",
    "fused_experts",
)
FLOAT8_OPS = ("linear_fp8_block", "fused_experts_fp8_block")
CPU_OPS = (
    "rms_norm",
    "layer_norm",
    "rotary",
    "write_kv",
    "rotary_kv",
    "gated_linear",
    "act_and_mul",
    "activation",
    "attention",
    "mla_attention",
    "latent_attention",
    "fused_experts",
)
COMPILED_OPS = ("rms_norm", "rotary", "rotary_kv", "gated_linear", "act_and_mul", "attention")


@hookimpl
def light_register_kernels(registry: KernelRegistry) -> None:
    """Declares every op of `light_sdk.ops`; where `linear` and `attend_runs` have no kernel, their reference is torch's own."""
    for op in ("linear", "gated_linear", "attend_runs", *TRITON_OPS):
        registry.op(op, reference=f"light_sdk.ops.{op}.reference:{op}")
    for op in TRITON_OPS:
        accepts = {"attention": _accepts_attention, "mla_attention": _accepts_latents, "latent_attention": _accepts_latents}.get(op)
        registry.kernel(
            Kernel(op, "triton", f"light_sdk.ops.{op}.kernel:{op}", ("cuda",), min_capability=(8, 0), dtypes=FLOATS, accepts=accepts)
        )
    registry.kernel(Kernel("linear", "triton+torch", "light_sdk.ops.linear.kernel:linear", ("cuda",), (9, 0), HALVES))
    runs = "light_sdk.ops.attend_runs.kernel:attend_runs"
    registry.kernel(Kernel("attend_runs", "triton+torch", runs, ("cuda",), (9, 0), HALVES, accepts=_accepts_split_heads))
    gated = "light_sdk.ops.gated_linear.kernel"
    registry.kernel(Kernel("gated_linear", "torch+triton", f"{gated}:composed", ("cuda",), (8, 0), FLOATS))
    registry.kernel(Kernel("gated_linear", "triton", f"{gated}:gated_linear", ("cuda",), (9, 0), HALVES, priority=10))
    hopper = "light_sdk.ops.attention.hopper:attention"
    registry.kernel(Kernel("attention", "triton+cudnn", hopper, ("cuda",), (9, 0), HALVES, priority=10, accepts=_accepts_dense))
    for op, target in (("mla_attention", "hopper:mla_attention"), ("latent_attention", "kernel:with_cudnn")):
        target = f"light_sdk.ops.{op}.{target}"
        registry.kernel(Kernel(op, "triton+cudnn", target, ("cuda",), (9, 0), HALVES, 10, _accepts_dense_latents))
    for op in FLOAT8_OPS:
        registry.op(op, reference=f"light_sdk.ops.{op}.reference:{op}")
        registry.kernel(Kernel(op, "triton", f"light_sdk.ops.{op}.kernel:{op}", ("cuda",), (8, 9), FLOATS))
    for op in CPU_OPS:
        registry.kernel(Kernel(op, "torch-cpu", f"light_sdk.ops.{op}.cpu:{op}", ("cpu",), dtypes=FLOATS))
    for op in COMPILED_OPS:
        target = f"light_sdk.ops.{op}.compiled:{op}"
        registry.kernel(Kernel(op, "numba-cpu", target, ("cpu",), dtypes=("float32", "bfloat16"), priority=10))
    packed = "light_sdk.ops.linear.cpu:linear"
    registry.kernel(Kernel("linear", "onednn", packed, ("cpu",), dtypes=("float32",), accepts=_accepts_packing))
    registry.kernel(Kernel("linear", "onednn-bf16", packed, ("cpu",), dtypes=("bfloat16",), accepts=_accepts_packing_bfloat16))
    few = "light_sdk.ops.linear.compiled:linear"
    registry.kernel(Kernel("linear", "numba+onednn", few, ("cpu",), dtypes=("bfloat16",), priority=10, accepts=_accepts_few_rows))


def _accepts_packing(facts: Mapping[str, Any]) -> str | None:
    """None if oneDNN can lay weights out on this processor, else why not. Asked for models on a CPU alone."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"runs on x86-64, not on {platform.machine()}"
    return None if torch.backends.mkldnn.is_available() else "needs a torch with oneDNN"  # type: ignore[no-untyped-call]


def _accepts_packing_bfloat16(facts: Mapping[str, Any]) -> str | None:
    """As `_accepts_packing`, for weights in bfloat16."""
    if refusal := _accepts_packing(facts):
        return refusal
    import torch

    return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "needs AVX-512 or AMX"


def _accepts_few_rows(facts: Mapping[str, Any]) -> str | None:
    """As `_accepts_packing_bfloat16`, where oneDNN was measured to read weights below the memory's rate."""
    if refusal := _accepts_packing_bfloat16(facts):
        return refusal
    import torch

    return None if torch.cpu._is_amx_tile_supported() else "needs AMX; elsewhere oneDNN reads as fast"


def _accepts_dense(facts: Mapping[str, Any]) -> str | None:
    """None if cuDNN serves these heads, else why not."""
    if facts.get("alibi") or facts.get("window") is not None:
        return "takes neither ALiBi nor a window"
    if facts.get("head_dim", 1) % 8 or facts.get("head_dim", 1) > MAX_DENSE_HEAD_DIM:
        return f"takes head_dim in eights up to {MAX_DENSE_HEAD_DIM}, not {facts.get('head_dim')}"
    return _accepts_attention(facts)


def _accepts_split_heads(facts: Mapping[str, Any]) -> str | None:
    """None if heads are wide as cuDNN has no tile for, else why not."""
    head_dim = facts.get("head_dim")
    return None if head_dim == SPLIT_HEAD_DIM else f"takes heads of {SPLIT_HEAD_DIM}, not {head_dim}"


def _accepts_attention(facts: Mapping[str, Any]) -> str | None:
    """None if the Triton kernels serve these heads, else why not."""
    head_dim, num_heads, num_kv_heads = (facts.get(name, 1) for name in ("head_dim", "num_heads", "num_kv_heads"))
    if head_dim > MAX_HEAD_DIM:
        return f"takes head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    if num_heads % num_kv_heads:
        return f"takes query heads in equal groups, not {num_heads} over {num_kv_heads}"
    return None


def _accepts_dense_latents(facts: Mapping[str, Any]) -> str | None:
    """None if cuDNN serves keys and values made of these latents, else why not."""
    whole_key, value = facts.get("key_dim", 0) + facts.get("rotary_dim", 0), facts.get("value_dim", 0)
    if whole_key % 8 or value % 8:
        return f"takes keys and values in eights, not {whole_key} and {value}"
    return _accepts_latents(facts)


def _accepts_latents(facts: Mapping[str, Any]) -> str | None:
    """None if the Triton kernels serve these latents, else why not."""
    if facts.get("rank", 1) > MAX_LATENT_RANK:
        return f"takes latents of rank up to {MAX_LATENT_RANK}, not {facts.get('rank')}"
    if max(facts.get("key_dim", 1), facts.get("value_dim", 1)) > MAX_HEAD_DIM:
        return f"takes heads up to {MAX_HEAD_DIM} wide, not {facts.get('key_dim')} and {facts.get('value_dim')}"
    return None
