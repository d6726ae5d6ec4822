"""Speed of the op `resample_axis` beside the roofline: `python plugins/qwen_vl/benchmarks/resampling.py [--device cpu]`.

For each size of picture, both axes: microseconds of the kernel and of the reference, each compared with Pillow first. A wrong
one prints no number and the program ends with status 1. The floor is that of reading the pixels and writing the new ones
once, at 4.2 TB/s; pictures are small enough to stay in L2, and a launch takes longer than that.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from light_qwen_vl import resampling
from light_qwen_vl.resampling import ResampleAxis, rows_first, sampling_table

BANDWIDTH = 4.2e12
SIZES = ((1000, 1000, 1008, 1008), (1500, 2000, 868, 1148), (4000, 3000, 1148, 868), (224, 224, 252, 252))
"""Height and width before and after."""
CALLS, WARM_UPS = 20, 3


def seconds(run: Callable[[], object], device: str) -> float:
    """Median of `CALLS` calls: on a GPU by events, with all calls enqueued before the first is waited for."""
    for _ in range(WARM_UPS):
        run()
    if device == "cpu":
        times = []
        for _ in range(CALLS):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks)) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device, wrong = parser.parse_args().device, 0
    implementations: dict[str, ResampleAxis] = {"reference": resampling.resample_axis}
    if device == "cuda":
        from light_qwen_vl.resampling_kernel import resample_axis

        implementations["triton"] = resample_axis
    for height, width, new_height, new_width in SIZES:
        given = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = np.asarray(Image.fromarray(given).resize((new_width, new_height), Image.Resampling.BICUBIC))
        tables = sampling_table(height, new_height), sampling_table(width, new_width)
        pixels, rows, columns = (tensor.to(device) for tensor in (torch.from_numpy(given), *tables))
        between = new_height * width if rows_first(height, width, new_height, new_width) else height * new_width
        floor = 3 * (height * width + 2 * between + new_height * new_width) / BANDWIDTH
        for name, along in implementations.items():
            label = f"{height} x {width} to {new_height} x {new_width}  {name:9}"
            run = functools.partial(resampling.resample, pixels, rows, columns, along)
            if not np.array_equal(run().cpu().numpy(), expected):
                wrong += 1
                print(f"{label}  other pixels than Pillow's")
                continue
            took = seconds(run, device)
            print(f"{label} {took * 1e6:9.1f} us" + (f", {floor / took:.2f} of the roofline" if device == "cuda" else ""))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
