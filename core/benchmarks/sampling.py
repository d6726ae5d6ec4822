"""Time of the sampler's ops on a GPU, beside the time to read the logits once: `python core/benchmarks/sampling.py`.

Each case is checked against the reference before it is timed; a case that fails prints no number and the program ends
with status 1. "op" is the device's time with inputs in place (median, CUDA events around many launches of the ops);
"step" is the wall time of whole steps one after the other: prepare, upload, ops and the copy of the tokens.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from light_core.engine import hooks
from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import Sampler
from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.sampling_params import SamplingParams

CASES = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p": {"top_p": 0.9},
    "top-k and top-p": {"top_k": 50, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "flat, top-p": {"top_p": 0.9, "temperature": 20.0},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}
ALLOWED_DIFFERENCES = 0.05
"""Share of rows that may differ: sums in another order move borders by about 1e-6 of the mass, and those of float32
references over a flat distribution by more."""
REPEATS, LAUNCHES = 7, 20


def create_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """As a language model's: most tokens far below, some tens that compete, [num_rows, vocab_size] bfloat16."""
    logits = 2.0 * torch.randn((num_rows, vocab_size), device="cuda")
    favoured = torch.randint(0, vocab_size, (num_rows, 40), device="cuda")
    logits.scatter_add_(1, favoured, 8.0 + 2.0 * torch.randn((num_rows, 40), device="cuda"))
    return logits.bfloat16()


def create_sampler(kernel: str, num_rows: int, vocab_size: int, params: SamplingParams) -> Sampler:
    """A sampler on ops named `kernel`, with all rows admitted."""
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    machine = Machine("cuda", torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    sampler = Sampler(OpTable(registry, machine, "bfloat16", dict.fromkeys(hooks.OPS, kernel)), num_rows, vocab_size, "cuda")
    for row in range(num_rows):
        sampler.admit(row, EngineRequest(row, np.arange(100, dtype=np.int32), params, seed=row))
    return sampler


def differences(logits: torch.Tensor, params: SamplingParams) -> float:
    """Share of rows whose token is not the reference's."""
    num_rows, vocab_size = logits.shape
    rows, tokens = np.arange(num_rows, dtype=np.int32), []
    for kernel in ("triton", "reference"):
        sampler = create_sampler(kernel, num_rows, vocab_size, params)
        result = sampler.sample(logits, sampler.prepare(rows, np.zeros(num_rows, np.int32))).result()
        tokens.append(result.token_ids)
    return float((tokens[0] != tokens[1]).mean())


def median_time(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call of `run`: on the device, if launches do not lag behind, and on the wall."""
    for _ in range(3):
        run()
    device, wall = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(LAUNCHES):
            run()
        end.record()
        torch.cuda.synchronize()
        wall.append((time.perf_counter() - began) / LAUNCHES)
        device.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return statistics.median(device), statistics.median(wall)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, so that the host's launches do not count."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes per second that the GPU reads (default: H200)")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: these kernels are measured on a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, V {arguments.vocab_size}, bfloat16 logits")
    print(f"{'case':18} {'rows':>5} {'op us':>9} {'GB/s':>8} {'of roofline':>12} {'step us':>9}")
    right = True
    for num_rows in arguments.rows:
        logits = create_logits(num_rows, arguments.vocab_size)
        floor = logits.nbytes / arguments.bandwidth
        for name in arguments.cases:
            params = SamplingParams(max_tokens=None, **CASES[name])
            wrong = differences(logits, params)
            if wrong > max(ALLOWED_DIFFERENCES, 1.5 / num_rows if num_rows > 1 else 0.0):
                print(f"{name:18} {num_rows:5} differs from the reference in {wrong:.1%} of the rows", file=sys.stderr)
                right = False
                continue
            sampler = create_sampler("triton", num_rows, arguments.vocab_size, params)
            rows, counts = np.arange(num_rows, dtype=np.int32), np.zeros(num_rows, np.int32)
            plan = sampler.stage(sampler.prepare(rows, counts))
            device, _ = median_time(captured(lambda sampler=sampler, plan=plan, logits=logits: sampler.launch(logits, plan)))

            def step(sampler=sampler, logits=logits, rows=rows, counts=counts):
                sampler.sample(logits, sampler.prepare(rows, counts)).to_host()

            _, wall = median_time(step)
            rate = logits.nbytes / device / 1e9
            print(f"{name:18} {num_rows:5} {device * 1e6:9.1f} {rate:8.0f} {floor / device:12.1%} {wall * 1e6:9.1f}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
