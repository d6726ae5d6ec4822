"""What a step costs the host: plan and commit, by running and by waiting requests.

Run: `python core/benchmarks/scheduling.py [--repeats N] [--json FILE]`. The floors are the targets of the design: the
host's work must hide behind a step of the device, and must not depend on how many requests wait.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import numpy as np

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler

PROMPT_LEN, WAITING_PROMPT_LEN = 128, 1024
TARGETS_MS = {64: 0.15, 256: 0.3}


def measure(num_running: int, num_waiting: int, repeats: int, *, is_full: bool) -> dict[str, float | int | str]:
    """Median and 99th percentile of plan plus commit, one step planned ahead, in ms.

    Args:
        num_running: requests that decode.
        num_waiting: requests behind them.
        repeats: steps that are measured.
        is_full: the waiting ones lack memory, and the first of them is aborted and one arrives before each step, so
            that every step evaluates a candidate and refuses it; else they lack rows.
    """
    output_len = repeats + 64
    held = num_running * (PROMPT_LEN + output_len)
    scheduler = Scheduler(
        num_slots=held if is_full else 2 * held,
        max_num_seqs=num_running + 8 if is_full else num_running,
        max_num_batched_tokens=8192,
        max_model_len=131_072,
    )
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=output_len)

    def request(index: int) -> EngineRequest:
        size = PROMPT_LEN if index < num_running else WAITING_PROMPT_LEN
        return EngineRequest(index, rng.integers(1, 32_000, size=size, dtype=np.int32), params, frozenset({0}))

    for index in range(num_running + num_waiting):
        scheduler.add(request(index))
    sampled = rng.integers(1, 32_000, size=num_running + 8, dtype=np.int32)
    in_flight = []
    times: list[float] = []
    gc.collect()
    gc.freeze()
    head, next_id = num_running, num_running + num_waiting
    for step in range(repeats + 32):
        if is_full and step > 16:
            scheduler.abort(head)
            scheduler.add(request(next_id))
            head, next_id = head + 1, next_id + 1
        begin = time.perf_counter()
        in_flight.append(scheduler.plan())
        if len(in_flight) > 1:
            plan = in_flight.pop(0)
            assert plan is not None
            scheduler.commit(plan, sampled[: len(plan.sample_rows)])
        if step >= 32:
            times.append((time.perf_counter() - begin) * 1e3)
    gc.unfreeze()
    stats = scheduler.stats()
    assert stats.num_requests_running == num_running and stats.preemptions == 0, stats
    return {
        "running": num_running,
        "waiting": stats.num_requests_waiting,
        "waiting_for": "memory" if is_full else "rows",
        "median_ms": round(float(np.median(times)), 4),
        "p99_ms": round(float(np.percentile(times, 99)), 4),
    }


def measure_sharing(
    count: int = 512, prefix_len: int = 2048, own_len: int = 128, *, changes: bool, repeats: int = 200
) -> dict[str, float | str]:
    """Median time of a plan, and of that without looking for shared prefixes, in ms, where `count` decodes begin alike.

    Args:
        count: requests that decode.
        prefix_len, own_len: tokens of each prompt that all have, and that it alone has.
        changes: the oldest request is aborted and one arrives before each step, so that groups are found anew in each.
        repeats: steps that are measured.
    """
    medians = []
    for is_sharing in (True, False):
        scheduler = Scheduler(num_slots=900_000, max_num_seqs=count, max_num_batched_tokens=8192, max_model_len=131_072)
        if not is_sharing:
            scheduler._groups = None
        rng, next_id = np.random.default_rng(0), 0
        times: list[float] = []
        while len(times) < repeats:
            is_full = scheduler.num_unfinished == count
            for _ in range(1 if is_full and changes else count - scheduler.num_unfinished):
                if is_full:
                    scheduler.abort(next_id - count)
                prompt = np.append(np.arange(prefix_len), rng.integers(40_000, 2**20, own_len)).astype(np.int32)
                scheduler.add(EngineRequest(next_id, prompt, SamplingParams(max_tokens=1000), frozenset({0})))
                next_id += 1
            begin = time.perf_counter()
            plan = scheduler.plan()
            elapsed = (time.perf_counter() - begin) * 1e3
            assert plan is not None
            if plan.num_decodes >= count - 1:
                assert (plan.shared_prefixes is not None) == is_sharing
                times.append(elapsed)
            scheduler.commit(plan, np.full(len(plan.sample_rows), 7, np.int32))
        medians.append(round(float(np.median(times)), 4))
    return {"sharing": "changes" if changes else "stays", "plan_ms": medians[0], "without_ms": medians[1]}


def measure_burst(count: int = 512, prefix_len: int = 2048) -> float:
    """Time of the plan that admits `count` requests with a common prefix at once, in ms."""
    scheduler = Scheduler(num_slots=900_000, max_num_seqs=count, max_num_batched_tokens=8192, max_model_len=131_072)
    for index in range(count):
        prompt = np.append(np.arange(prefix_len), [40_000 + index]).astype(np.int32)
        scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=500), frozenset({0})))
    begin = time.perf_counter()
    plan = scheduler.plan()
    elapsed = time.perf_counter() - begin
    assert plan is not None and plan.num_tokens == prefix_len + count
    return round(elapsed * 1e3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500, help="steps measured for each line")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    args = parser.parse_args()
    table = [
        measure(running, waiting, args.repeats, is_full=is_full)
        for is_full in (False, True)
        for running in (64, 256)
        for waiting in (10, 1_000, 100_000)
    ]
    print(f"{'running':>8} {'waiting':>8} {'for':>7} {'median ms':>10} {'p99 ms':>8} {'target ms':>10}")
    for line in table:
        print(
            f"{line['running']:>8} {line['waiting']:>8} {line['waiting_for']:>7} {line['median_ms']:>10} {line['p99_ms']:>8} "
            f"{TARGETS_MS[int(line['running'])]:>10}"
        )
    sharing = [measure_sharing(changes=changes) for changes in (False, True)]
    for row in sharing:
        print(f"plan of 512 decodes, sharing {row['sharing']}: {row['plan_ms']} ms; without looking for it: {row['without_ms']} ms")
    burst = measure_burst()
    print(f"512 requests with a common prefix of 2,048 tokens, all in one plan: {burst} ms")
    text = json.dumps({"steps": table, "sharing": sharing, "burst_ms": burst}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
