"""Host time of launching a layer's kernels, without a GPU.

    python sdk/benchmarks/host.py [--gpu h200] [--only rms_norm,attention] [--output-json FILE]

A step with prefill chunks is launched kernel by kernel from Python, and a GPU that is done with a layer before the next one
has been launched waits. This is what the Triton ops of a layer take of the host: tensors lie on the CPU, the ops are told that
they lie on the GPU, and launching does nothing (`light_sdk.testing.absent_gpu`). Not in it: torch's own products, what a driver
takes to launch, and Triton's look at each pointer. Shapes are those of Llama 3.1 8B and DeepSeek-V2-Lite; times are the least
of several rounds, so other work on the machine is not in them.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from light_core.types import Step
from light_sdk.ops import dependent, tuning
from light_sdk.testing.absent_gpu import GPUS, absent_gpu

DTYPE = torch.bfloat16
NUM_SLOTS, MAX_SEQS, MAX_LEN = 4096, 256, 2048
ROUNDS, CALLS = 20, 200
STEPS = {"40 decodes, 1 chunk of 472": (40, (472,)), "190 decodes, 2 chunks of 161": (190, (161, 161))}
LAYER = {"rms_norm": 2, "rotary_kv": 1, "attention": 1, "act_and_mul": 1}
"""How often a layer of Llama launches each op."""

Call = tuple[str, Callable[[], object]]


def create_step(num_decodes: int, chunks: tuple[int, ...]) -> Step:
    """`num_decodes` requests of 1,024 tokens, and prompts of the lengths `chunks`."""
    num_seqs, num_tokens = num_decodes + len(chunks), num_decodes + sum(chunks)
    tokens, seqs = torch.zeros(num_tokens, dtype=torch.int32), torch.zeros(num_seqs, dtype=torch.int32)
    return Step(
        token_ids=tokens,
        positions=tokens,
        context_lens=tokens,
        slots=tokens.long(),
        cu_seqlens_q=torch.zeros(num_seqs + 1, dtype=torch.int32),
        seq_lens=seqs,
        rows=seqs,
        slot_table=torch.zeros(MAX_SEQS + 1, MAX_LEN, dtype=torch.int32),
        logits_rows=seqs.long(),
        num_decodes=num_decodes,
        max_query_len=max(chunks, default=1),
        max_seq_len=1024,
        prefill_lens=tuple((length, length) for length in chunks),
    )


def llama_calls(step: Step) -> Iterator[Call]:
    """Each op of a layer, as the layer calls it, beginning with those of `LAYER`."""
    from light_sdk.ops.act_and_mul.kernel import act_and_mul
    from light_sdk.ops.attention.hopper import attention
    from light_sdk.ops.rms_norm.kernel import rms_norm
    from light_sdk.ops.rotary_kv.kernel import rotary_kv
    from light_sdk.ops.write_kv.kernel import write_kv

    num_tokens, num_heads, num_kv_heads, head_dim, size, inner = step.num_tokens, 32, 8, 128, 4096, 14336
    x, residual, out, weight = empty(num_tokens, size), empty(num_tokens, size), empty(num_tokens, num_heads, head_dim), empty(size)
    q, k, v = empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim).split([num_heads, num_kv_heads, num_kv_heads], 1)
    k_cache, v_cache = empty(NUM_SLOTS, num_kv_heads, head_dim), empty(NUM_SLOTS, num_kv_heads, head_dim)
    cos_sin, gates, gated = torch.empty(num_tokens, head_dim), empty(num_tokens, 2 * inner), empty(num_tokens, inner)
    yield "rms_norm", lambda: rms_norm(x, x, weight, 1e-5, residual)
    yield "rotary_kv", lambda: rotary_kv(q, k, v, cos_sin, k_cache, v_cache, step.slots)
    yield "attention", lambda: attention(out, q, k_cache, v_cache, step, 0.1, None, None, k, v)
    yield "act_and_mul", lambda: act_and_mul(gated, gates, "silu")
    yield "write_kv", lambda: write_kv(k, v, k_cache, v_cache, step.slots)


def deepseek_calls(step: Step) -> Iterator[Call]:
    """The ops of a layer that are its own. Their prefill is torch's products, so that only decodes are measured."""
    from light_sdk.ops.mla_attention.decode import attend_latents
    from light_sdk.ops.mla_attention.heads import multiply_heads
    from light_sdk.ops.mla_attention.tuning import decode_config
    from light_sdk.ops.write_latent.kernel import write_latent

    num_tokens, num_heads, rank, rotary_dim, value_dim = step.num_tokens, 16, 512, 64, 128
    q, kv, weight = empty(num_tokens, num_heads, rotary_dim), empty(num_tokens, rank + rotary_dim), empty(rank)
    cache, cos_sin = empty(NUM_SLOTS, rank + rotary_dim), torch.empty(num_tokens, rotary_dim)
    q_latent, sums, out = (empty(step.num_decodes, num_heads, size) for size in (rank, rank, value_dim))
    values, rope = empty(num_heads, value_dim, rank), q[: step.num_decodes]
    yield "write_latent", lambda: write_latent(q, kv, weight, 1e-6, cos_sin, True, cache, step.slots)
    yield "attend_latents", lambda: attend_latents(sums, q_latent, rope, cache, step, 0.1, decode_config(q_latent, step.num_decodes))
    yield "multiply_heads", lambda: multiply_heads(out, sums, values)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPE)


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, after one that compiles its kernels."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - began)
    return 1e6 * best / CALLS


def answer_for_gpu() -> None:
    """Tells ops, which are imported after this, of the GPU wherever their tensors are."""
    for module, name in ((dependent, "dependent"), (tuning, "device_name"), (tuning, "num_processors")):
        answer = getattr(module, name)(torch.device("cuda:0"))
        setattr(module, name, functools.cache(lambda device, answer=answer: answer))


def main() -> int:
    parser = argparse.ArgumentParser(description="Host time of launching a layer's kernels, without a GPU.")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200")
    parser.add_argument("--only", default="", help="names of ops, with commas between; all otherwise")
    parser.add_argument("--output-json", type=Path)
    given = parser.parse_args()
    only = set(filter(None, given.only.split(",")))
    results: dict[str, dict[str, float]] = {}
    with absent_gpu(GPUS[given.gpu]), torch.inference_mode():
        answer_for_gpu()
        print(f"{GPUS[given.gpu].name} (absent), torch {torch.__version__}, triton {triton.__version__}, microseconds of the host")
        for title, shape in STEPS.items():
            step = create_step(*shape)
            calls = dict((*llama_calls(step), *deepseek_calls(step)))
            found = results[title] = {name: microseconds(call) for name, call in calls.items() if not only or name in only}
            if found.keys() >= LAYER.keys():
                found["a layer of Llama"] = sum(count * found[name] for name, count in LAYER.items())
            print(f"\n{title}\n" + "\n".join(f"  {name:16} {time_us:7.1f}" for name, time_us in found.items()), flush=True)
    if given.output_json:
        given.output_json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
