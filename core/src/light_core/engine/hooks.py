"""Core's own plugin: the sampler's ops, through the same hook as everybody's."""

from light_core.hookspecs import hookimpl
from light_core.ops import Kernel, KernelRegistry

light_api = 1

OPS = ("process_logits", "sample", "token_logprobs")
PACKAGE = "light_core.engine.sampling"


@hookimpl
def light_register_kernels(registry: KernelRegistry) -> None:
    """Declares the sampler's ops; Triton serves them on CUDA."""
    for op in OPS:
        registry.op(op, reference=f"{PACKAGE}.reference:{op}")
        registry.kernel(Kernel(op, "triton", f"{PACKAGE}.kernel:{op}"))
