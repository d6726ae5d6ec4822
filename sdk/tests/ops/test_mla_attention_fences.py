"""What tensor cores read has been fenced: the prefill kernel of latent attention for odd widths, compiled without a GPU.

`wgmma` reads shared memory by another path than ordinary loads. What threads have stored there is safe for it after each of
them has executed `fence.proxy.async` and then met the others at a barrier. Where one factor of a product is copied ahead and
another is not, Triton has the threads meet first and fence afterwards; `stages_of` avoids that.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SIZES = (2, 40, 24, 8, 12)
"""Heads, rank of the latents, key width without positions, rotary width, value width: rows of latents begin at multiples of
16 elements, rows of keys and values do not."""
STAGES = 3


def unfenced(ptx: str) -> int:
    """Products that may read what was stored and not fenced before a barrier.

    Counted are those with a fence between the barrier and them: of those with none, the operands are not what was stored.
    """
    count, stored, fenced = 0, False, False
    for line in map(str.strip, ptx.splitlines()):
        if re.match(r"(@%p\d+ )?st\.shared", line):
            stored, fenced = True, False
        elif line.startswith("fence.proxy.async"):
            fenced = stored
        elif line.startswith("bar.sync") and fenced:
            stored = fenced = False
        elif line.startswith("wgmma.mma_async") and fenced:
            count += 1
    return count


def compile_prefill(num_stages: int) -> str:
    """PTX of the kernel for chunks of such a model in bfloat16, on Hopper."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from light_sdk.ops.mla_attention.prefill import _prefill_kernel

    num_heads, rank, key_dim, rotary_dim, value_dim = SIZES
    strides = {
        "out_stride_t": num_heads * value_dim,
        "out_stride_h": value_dim,
        "q_stride_t": num_heads * (key_dim + rotary_dim),
        "q_stride_h": key_dim + rotary_dim,
        "kv_stride_n": num_heads * (key_dim + value_dim),
        "kv_stride_h": key_dim + value_dim,
        "rope_stride_n": rank + rotary_dim,
    }
    constants = {"NUM_HEADS": num_heads, "KEY_DIM": key_dim, "ROTARY": rotary_dim, "VALUE_DIM": value_dim}
    constants |= {"CAUSAL": True, "HAS_STATE": False, "BLOCK_M": 128, "BLOCK_N": 64}
    constants |= {name: max(16, triton.next_power_of_2(size)) for name, size in zip(("BLOCK_P", "BLOCK_R", "BLOCK_O"), SIZES[2:])}
    types = {"state_ptr": "*fp32", "lse_ptr": "*fp32", "segments_ptr": "*i32", "scale": "fp32"}
    signature, places, attributes = {}, {}, {}
    for place, name in enumerate(_prefill_kernel.arg_names):
        if name in constants:
            signature[name], places[(place,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or strides.get(name, 1) % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(_prefill_kernel, signature, places, attributes)
    options = {"num_warps": 8, "num_stages": num_stages}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    return ptx


def main() -> None:
    """Prints how many products of the kernel are not fenced: as it is launched, and copied ahead whatever the strides are."""
    from light_sdk.ops.mla_attention.tuning import stages_of

    num_heads, rank, key_dim, rotary_dim, value_dim = SIZES
    launched = stages_of(STAGES, num_heads * (key_dim + value_dim), key_dim + value_dim, rank + rotary_dim)
    print(json.dumps({"launched": unfenced(compile_prefill(launched)), "ahead": unfenced(compile_prefill(STAGES))}))


def test_products_are_fenced(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["launched"] == 0
    assert counts["ahead"] > 0, "this Triton fences where it should: `stages_of` has become needless"


if __name__ == "__main__":
    main()
