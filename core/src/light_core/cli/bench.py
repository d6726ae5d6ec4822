"""`light bench`: throughput of the offline API, load on a running server, and the budget of one step.

Commands alone; what they measure is in `light_core.bench`.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from light_core.bench import report
from light_core.bench.plots import check_matplotlib
from light_core.bench.workloads import choose_workloads, create_requests
from light_core.cli.http import Server
from light_core.cli.settings import create_llm, engine_config
from light_core.errors import ConfigError

__all__ = ["offline", "serve", "step"]

Number = TypeVar("Number", int, float)

OFFLINE_PROMPTS, SERVE_PROMPTS, SERVE_CONCURRENCY = 64, 200, 64
VOCAB_SIZE = 30_000  # of a server that does not tell
PREFILL_SHARE = 8  # decode steps to a prefill step


def numbers(option: str, text: str | None, kind: Callable[[str], Number]) -> list[Number]:
    """Comma separated numbers of an option; [] for None. Raises `ConfigError`."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} cannot be read", str(error), f"give numbers, comma separated: {option} 1,4,16") from error


def offline(
    model: str,
    workload: str | None,
    num_prompts: int | None,
    input_len: int | None,
    output_len: int | None,
    length_scale: float,
    rounds: int,
    warmup_rounds: int,
    output_json: str | None,
    plot: str | None,
    **values: Any,
) -> None:
    """Runs each workload and prints its table."""
    chosen = choose_workloads(workload, num_prompts, input_len, output_len, length_scale, OFFLINE_PROMPTS)
    check_matplotlib(plot)
    report.check_writable(output_json, plot)
    from light_core.bench.offline import check_lengths, run_workload

    config = engine_config(model, {**values, "skip_tokenizer_init": True})
    llm = create_llm(config)
    check_lengths(chosen, llm.engine.resolved.limits.max_model_len)
    results = []
    for one in chosen:
        results.append({"model": model, **run_workload(llm, one, rounds, warmup_rounds, config.seed)})
        report.show(results[-1], without=("model", "latencies", "percentiles"), gap=len(results) > 1)
    llm.shutdown()
    report.write_json(output_json, results)
    if plot:
        from light_core.bench.plots import plot_offline

        plot_offline(plot, results)


def serve(
    url: str,
    endpoint: str,
    api_key: str | None,
    model: str | None,
    workload: str | None,
    num_prompts: int | None,
    input_len: int | None,
    output_len: int | None,
    length_scale: float,
    request_rate: str | None,
    burstiness: float,
    max_concurrency: str | None,
    goodput: str | None,
    metric_percentiles: str,
    clients: int | None,
    timeout: float,
    vocab_size: int | None,
    seed: int,
    save_detailed: bool,
    output_json: str | None,
    plot: str | None,
) -> None:
    """Loads the server once for each rate and concurrency, each time with fresh prompts, and prints the tables."""
    from light_core.bench import serving
    from light_core.bench.client import Target

    chosen = choose_workloads(workload, num_prompts, input_len, output_len, length_scale, SERVE_PROMPTS)
    rates, concurrencies = numbers("--request-rate", request_rate, float), numbers("--max-concurrency", max_concurrency, int)
    loads = serving.choose_loads(rates, concurrencies, burstiness, SERVE_CONCURRENCY)
    bounds, percentiles = serving.parse_goodput(goodput), numbers("--metric-percentiles", metric_percentiles, float)
    check_matplotlib(plot)
    report.check_writable(output_json, plot)
    server = Server(url, api_key)
    name = model or server.model()
    target, vocab = Target.parse(url, endpoint, api_key), vocab_size or _vocab_size(server, name)
    serving.probe(target, name, create_requests(chosen[0], vocab, seed)[0], timeout)
    results, runs = [], []
    for index, (one, load) in enumerate((one, load) for one in chosen for load in loads):
        requests = create_requests(one, vocab, seed + 1 + index)
        samples, duration = serving.measure(target, name, requests, load, seed=seed + index, clients=clients, timeout_s=timeout)
        result: dict[str, Any] = {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai",
            "model_id": name,
            "workload": one.name,
            "num_prompts": len(requests),
            "request_rate": load.request_rate or "inf",
            "burstiness": load.burstiness,
            "max_concurrency": load.max_concurrency,
            **serving.metrics(samples, duration, percentiles, bounds),
        }
        report.show(result, without=("date", "endpoint_type"), gap=index > 0)
        results.append(result | (serving.details(samples) if save_detailed else {}))
        runs.append(samples)
    report.write_json(output_json, results)
    if plot:
        from light_core.bench.plots import plot_serving

        plot_serving(plot, results, runs)


def step(
    model: str,
    batch: str,
    context: int,
    prefill: str,
    steps: int,
    top: int,
    output_json: str | None,
    plot: str | None,
    **values: Any,
) -> None:
    """Prints the budget of each decode and prefill step."""
    batches, prefills = numbers("--batch", batch, int), numbers("--prefill", prefill, int)
    if min(batches + prefills, default=0) < 1:
        raise ConfigError("there is no step to measure", f"--batch {batch!r}, --prefill {prefill!r}", "give numbers of 1 or more")
    check_matplotlib(plot)
    report.check_writable(output_json, plot)
    import torch

    from light_core.bench.budget_table import print_budget, print_ceilings
    from light_core.bench.ceilings import measure_ceilings
    from light_core.bench.step import StepMeter, fit_config
    from light_core.engine.engine import Engine

    config = fit_config(engine_config(model, {**values, "skip_tokenizer_init": True}), batches, prefills)
    engine = Engine(config, paced=True)
    device, dtype = torch.device(engine.resolved.device), engine.runtime.model.torch_dtype
    ceilings = measure_ceilings(device, dtype)
    print_ceilings(engine, ceilings)
    meter = StepMeter(engine, ceilings, config.seed)
    budgets = []
    for size in batches:
        budgets.append(meter.decode(size, context, steps))
        print_budget(budgets[-1], top)
    for size in prefills:
        budgets.append(meter.prefill(size, max(2, steps // PREFILL_SHARE)))
        print_budget(budgets[-1], top)
    engine.shutdown()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = {"device": name, "dtype": engine.resolved.dtype, "torch": torch.__version__}
    rates = {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s}
    report.write_json(output_json, [{"model": model, **machine, "ceilings": rates, "steps": [budget.as_dict() for budget in budgets]}])
    if plot:
        from light_core.bench.plots import plot_steps

        plot_steps(plot, budgets)


def _vocab_size(server: Server, name: str) -> int:
    models = server.call("GET", "/v1/models")["data"]
    return int(next((one.get("vocab_size") for one in models if one["id"] == name), None) or VOCAB_SIZE)
