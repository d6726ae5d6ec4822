"""How costs grow: a step's plan with running and waiting requests, a prefix match with the tree, a delta with streams.

    python core/benchmarks/scaling.py [--only NAME] [--json FILE] [--plot FILE.png] [--quick]

Needs no GPU and no model. For each curve it prints the figures, the growth exponent (the slope of a line through the
logarithms of size and cost: 0 is flat, 1 is proportional) and the line of fixed and proportional cost through them.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import uvloop
from streaming import run_clients, run_server

from light_core.bench.plots import check_matplotlib, plot_curves
from light_core.engine.requests import EngineRequest
from light_core.errors import LightError
from light_core.kv.radix import RadixCache
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler

Points = list[tuple[int, float]]

PROMPT_LEN, WAITING_PROMPT_LEN = 16, 1024
MAX_MODEL_LEN = 8192
WARM_STEPS = 8
RATE = 10.0  # tokens a second of each stream
SHARED_LEN, OWN_LEN, GROUP = 256, 64, 16
RUNNING = (1, 4, 16, 64, 256, 1024, 4096)
WAITING = (10, 100, 1_000, 10_000, 100_000)
NODES = (100, 1_000, 10_000, 100_000)
STREAMS = (1, 4, 16, 64, 256, 1000, 2000)


def exponent(points: Points) -> float:
    """Slope of the line through the logarithms of size and cost, by least squares; costs must be over 0."""
    sizes, costs = np.log(np.asarray(points, dtype=np.float64)).T
    return float(np.polyfit(sizes, costs, 1)[0])


def line(points: Points) -> tuple[float, float]:
    """Fixed cost, and cost of each one more: the line with the least squares of relative errors."""
    sizes, costs = np.asarray(points, dtype=np.float64).T
    each, fixed = np.polyfit(sizes, costs, 1, w=1 / costs)
    return float(fixed), float(each)


def step_costs(num_running: int, num_waiting: int, repeats: int, *, for_memory: bool) -> tuple[float, float]:
    """Medians of `plan` and of `commit` in µs, with one step planned ahead.

    Args:
        num_running: requests that decode.
        num_waiting: requests behind them.
        repeats: steps that are measured.
        for_memory: the waiting ones lack memory, and the first of them gives way to another before each step, so that
            every step looks at a candidate and refuses it; else they lack rows, and no step looks at them.
    """
    output_len = WARM_STEPS + repeats + 8
    held = num_running * (PROMPT_LEN + output_len)
    scheduler = Scheduler(
        num_slots=held + 1 if for_memory else 2 * held + MAX_MODEL_LEN,
        max_num_seqs=num_running + 8 * for_memory,
        max_num_batched_tokens=max(8192, 2 * num_running * PROMPT_LEN),
        max_model_len=MAX_MODEL_LEN,
    )
    rng = np.random.default_rng(0)
    params, long_prompt = SamplingParams(max_tokens=output_len), rng.integers(1, 32_000, WAITING_PROMPT_LEN, dtype=np.int32)

    def request(index: int) -> EngineRequest:
        if index < num_running:
            return EngineRequest(index, rng.integers(1, 32_000, PROMPT_LEN, dtype=np.int32), params, frozenset({0}))
        return EngineRequest(index, long_prompt, params, frozenset({0}))

    for index in range(num_running + num_waiting):
        scheduler.add(request(index))
    sampled = rng.integers(1, 32_000, num_running + 8, dtype=np.int32)
    in_flight, plan_s, commit_s = [], [], []
    head = num_running
    gc.collect()
    gc.freeze()
    for step in range(WARM_STEPS + repeats):
        if for_memory and step:
            scheduler.abort(head)
            scheduler.add(request(head + num_waiting))
            head += 1
        began = time.perf_counter()
        in_flight.append(scheduler.plan())
        planned = time.perf_counter()
        if len(in_flight) > 1:
            plan = in_flight.pop(0)
            committing = time.perf_counter()
            scheduler.commit(plan, sampled[: len(plan.sample_rows)])
            commit_s.append(time.perf_counter() - committing)
        plan_s.append(planned - began)
    gc.unfreeze()
    stats = scheduler.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.preemptions) == (num_running, num_waiting, 0), stats
    return tuple(float(np.median(times[-repeats:])) * 1e6 for times in (plan_s, commit_s))


def against_running(repeats: int, sizes: tuple[int, ...]) -> Iterator[dict]:
    """Plan and commit by running requests, all of which decode."""
    costs = [(size, *step_costs(size, 10, repeats, for_memory=False)) for size in sizes]
    yield curve("plan a step", "running requests", "µs", [(size, plan) for size, plan, _ in costs])
    yield curve("commit a step", "running requests", "µs", [(size, commit) for size, _, commit in costs])


def against_waiting(repeats: int, sizes: tuple[int, ...]) -> Iterator[dict]:
    """Plan by waiting requests, which lack rows, or memory."""
    for for_memory, name in ((False, "rows"), (True, "memory")):
        points = [(size, step_costs(64, size, repeats, for_memory=for_memory)[0]) for size in sizes]
        yield curve(f"plan, waiting for {name}", "waiting requests", "µs", points)


def tree_costs(num_nodes: int, repeats: int) -> tuple[float, float, float]:
    """Medians in µs of a match that finds all of a prompt, of one that finds the shared part of it alone, and of what an
    ended request costs with a full pool: insert its tokens, evict as many."""
    rng = np.random.default_rng(0)
    tree = RadixCache(8)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(1, 32_000, count, dtype=np.int32)

    prompts, shared = [], tokens(SHARED_LEN)
    while tree.num_nodes < num_nodes:
        if len(prompts) % GROUP == 0:
            shared = tokens(SHARED_LEN)
        prompts.append(np.concatenate([shared, tokens(OWN_LEN)]))
        tree.insert(tree.match("", prompts[-1][:0])[0], prompts[-1], np.zeros(SHARED_LEN + OWN_LEN, np.int32))
    gc.collect()
    gc.freeze()
    picked = rng.integers(0, len(prompts), repeats)
    known = [prompts[index] for index in picked]
    begun = [np.concatenate([prompt[:SHARED_LEN], tokens(OWN_LEN)]) for prompt in known]
    slots = np.zeros(SHARED_LEN + OWN_LEN, np.int32)

    def replace(prompt: np.ndarray) -> None:
        node, _, length = tree.match("", prompt)
        tree.insert(node, prompt[length:], slots[length:])
        tree.evict(len(prompt) - length)

    def match(prompt: np.ndarray) -> None:
        tree.match("", prompt)

    medians = [median_us(match, known), median_us(match, begun), median_us(replace, begun)]
    gc.unfreeze()
    return medians[0], medians[1], medians[2]


def median_us(run: Callable[[np.ndarray], None], arguments: list[np.ndarray]) -> float:
    """Of one call for each argument."""
    times = []
    for argument in arguments:
        began = time.perf_counter()
        run(argument)
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


def against_tree(repeats: int, sizes: tuple[int, ...]) -> Iterator[dict]:
    """Prefix cache by nodes of the tree."""
    costs = [(size, *tree_costs(size, max(repeats, 50))) for size in sizes]
    for index, title in enumerate(("match, all cached", "match, prefix cached", "match, insert, evict"), 1):
        yield curve(title, "nodes of the tree", "µs", [(cost[0], cost[index]) for cost in costs])


def against_streams(num_tokens: int, sizes: tuple[int, ...]) -> Iterator[dict]:
    """The server's CPU time by streams, each of which has `RATE` tokens a second: of one delta, between runs of n and of
    2n tokens a stream, so that what a request costs beside is left out; and of whole requests of one token."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(theirs, RATE), daemon=True)
    process.start()
    try:
        port = ours.recv()

        def cpu_us(streams: int, tokens: int) -> float:
            body = {"model": "stub", "max_tokens": tokens, "stream": True, "prompt": "the quick brown fox"}
            before = process_cpu_us(process.pid)
            uvloop.run(run_clients(port, "/v1/completions", body, streams))
            return process_cpu_us(process.pid) - before

        cpu_us(4, 8)
        runs = [(size, *(cpu_us(size, tokens) for tokens in (1, num_tokens, 2 * num_tokens))) for size in sizes]
    finally:
        process.kill()
        process.join()
    deltas = [(size, max(long - short, 1.0) / (size * num_tokens)) for size, _, short, long in runs]
    yield curve("stream a delta", "streams", "µs of CPU", deltas)
    yield curve("a request of one token", "streams", "µs of CPU", [(size, first / size) for size, first, *_ in runs])


def process_cpu_us(pid: int | None) -> float:
    """CPU time of all threads of a process, to the nanosecond where Linux tells it: /proc/PID/stat counts in 10 ms."""
    total_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended since it was listed
            total_ns += int(path.read_text().split()[0])
    return total_ns / 1e3


def curve(title: str, size: str, unit: str, points: Points) -> dict:
    """A finished curve: what it is called, its points, and how it grows."""
    fixed, each = line(points)
    return {"title": title, "size": size, "unit": unit, "points": points, "exponent": exponent(points), "fixed": fixed, "each": each}


CURVES = {"running": against_running, "waiting": against_waiting, "tree": against_tree, "streams": against_streams}
SIZES = {"running": RUNNING, "waiting": WAITING, "tree": NODES, "streams": STREAMS}
QUICK_SIZES = {"running": (1, 8, 64), "waiting": (10, 100), "tree": (20, 200), "streams": (1, 8)}


def show(one: dict) -> None:
    print(f"{one['title']}, {one['unit']} by {one['size']}:")
    print("  " + "   ".join(f"{size:,}: {cost:,.1f}" for size, cost in one["points"]))
    print(f"  exponent {one['exponent']:.2f}; {one['fixed']:,.1f} + {one['each']:.4f} for each", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(CURVES), help="may be repeated; all otherwise")
    parser.add_argument("--repeats", type=int, default=300, help="calls of each point")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a stream")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="file to write the curves to")
    parser.add_argument("--plot", help="PNG file to draw them in")
    args = parser.parse_args()
    try:
        check_matplotlib(args.plot)
    except LightError as error:
        print(error.block(), file=sys.stderr)
        return error.exit_code
    curves = []
    for name in args.only or CURVES:
        full, quick = (args.tokens, 2) if name == "streams" else (args.repeats, 20)
        for one in CURVES[name](min(full, quick) if args.quick else full, (QUICK_SIZES if args.quick else SIZES)[name]):
            show(one)
            curves.append(one)
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1) + "\n")
    if args.plot:
        plot_curves(args.plot, curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
