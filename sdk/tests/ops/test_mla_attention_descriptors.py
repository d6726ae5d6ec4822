"""Products of the prefill kernel of latent attention read what was stored for them: compiled for Hopper without a GPU.

In a process of its own, as Triton's interpreter has no compiler. The kernels are those that `prefill_attention` launches,
with the strides that it gives them. That keys have a place of their own in shared memory is checked with any Triton; what
goes wrong where they have not, with the ptxas of CUDA 12.8 alone (12.9, of Triton 3.9, is right).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

LAUNCHES = {
    "keys of 24, values of 12": ((2, 40, 24, 8, 12), "NVIDIA H200"),
    "the same, another GPU": ((2, 40, 24, 8, 12), "default"),
    "keys of 12, values of 33": ((5, 24, 12, 6, 33), "NVIDIA H200"),
    "rows of 40 latents": ((4, 32, 16, 8, 16), "default"),
}
"""Heads, rank of the latents, key width without positions, rotary width, value width; and whose parameters are taken. Published
widths are compiled with their families."""


def wrong_with_launch(sizes: tuple[int, ...], config, dtype) -> list[str]:
    """What is wrong with the kernels of one chunk after a prefix, one for either; the tensors have no GPU."""
    import torch
    import triton

    from light_core.engine.compilation import CompileQueue
    from light_core.types import Step
    from light_sdk.ops.mla_attention.prefill import prefill_attention
    from light_sdk.testing.descriptors import lost_descriptors

    num_heads, rank, key_dim, rotary_dim, value_dim = sizes
    prefix, num_tokens = 3, 5
    ints = torch.arange(prefix + num_tokens, dtype=torch.int32)
    q = torch.zeros(num_tokens, num_heads, key_dim + rotary_dim, dtype=dtype)
    cache = torch.zeros(len(ints), rank + rotary_dim, dtype=dtype)
    kv_b = torch.zeros(num_heads, key_dim + value_dim, rank, dtype=dtype)
    out = torch.empty(num_tokens, num_heads, value_dim, dtype=dtype)
    step = Step(
        token_ids=ints[prefix:],
        positions=ints[prefix:],
        context_lens=ints[prefix:] + 1,
        slots=ints[prefix:].long(),
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([len(ints)], dtype=torch.int32),
        rows=torch.zeros(1, dtype=torch.int32),
        slot_table=ints[None],
        logits_rows=torch.tensor([num_tokens - 1]),
        num_decodes=0,
        max_query_len=num_tokens,
        max_seq_len=len(ints),
    )
    queue = CompileQueue(1)
    with queue.collecting():
        prefill_attention(out, q, cache, kv_b, step, 0.1, config)
    assert len(queue.pending) == 2, "one kernel for the prefix, one for the chunk"
    kernels = [pending.result() for pending in queue.pending]
    assert all("wgmma" in kernel.asm["ptx"] for kernel in kernels), "nothing to check"
    keys = f"{config.block_n}x{max(16, triton.next_power_of_2(key_dim))}x"
    ahead = rf"async_copy_global_to_local .* -> <{keys}"
    shared = [f"keys {keys} are not copied ahead" for kernel in kernels if not re.search(ahead, kernel.asm["ttgir"])]
    return shared + [line for kernel in kernels for line in lost_descriptors(kernel.asm["cubin"])]


def main() -> None:
    """Prints what is wrong with each of `LAUNCHES`."""
    import torch

    from light_sdk.ops.mla_attention.tuning import _prefill_config
    from light_sdk.testing.absent_gpu import GPUS, absent_gpu

    with absent_gpu(GPUS["h200"]):
        found = {name: wrong_with_launch(sizes, _prefill_config(gpu, "2"), torch.bfloat16) for name, (sizes, gpu) in LAUNCHES.items()}
    print(json.dumps(found))


def test_products_read_what_was_stored(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {name: [] for name in LAUNCHES}


if __name__ == "__main__":
    main()
