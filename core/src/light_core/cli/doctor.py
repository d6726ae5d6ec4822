"""`light doctor MODEL`: would it start here? Reads configuration and file headers, never weights.

Binds the model on the meta device, so plugin, layout, weight plan and kernel choice are the real ones; then compares
the checkpoint's tensor names with the plan, memory with the machine, and tries the port. Every problem is listed, not
only the first.
"""

import gc
import json
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from light_core.cli.settings import engine_config, process_settings, server_settings
from light_core.errors import LightError

if TYPE_CHECKING:
    from light_core.config import EngineConfig
    from light_core.engine.loading import Resolved
    from light_core.plugins import ModelRuntime

__all__ = ["doctor"]

GIB = 2**30
MOST_HEADER_BYTES = 100 << 20


@dataclass(slots=True)
class _Report:
    """Lines of what was found, and the errors that would keep it from starting."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[LightError] = field(default_factory=list)

    def add(self, label: str, text: object) -> None:
        self.rows.append((label, str(text)))


def doctor(model: str, **values: Any) -> int:
    """Prints the findings; returns 0 if the model would start, else 2."""
    # A third of the time of importing torch and transformers goes to the collector, and nothing here lives long.
    gc.disable()
    report = _Report()
    config, settings = engine_config(model, values), process_settings(values)
    server_settings(model, values)  # raises for what the server would not take
    try:
        _check_model(config, report)
    except LightError as error:
        report.problems.append(error)
    _check_port(settings.host, settings.port, report)
    width = max((len(label) for label, _ in report.rows), default=0)
    for label, text in report.rows:
        click.echo(f"{label:<{width}}  {text}")
    for problem in report.problems:
        click.echo()
        click.echo(problem.block())
    click.echo()
    click.echo(f"{model} would start" if not report.problems else f"{model} would not start: {len(report.problems)} reason(s)")
    return 2 if report.problems else 0


def _resolve(config: "EngineConfig", report: _Report) -> "tuple[EngineConfig, Resolved]":
    """Resolves the model; a device or a length that cannot be had is noted and let go, so that the rest is looked at."""
    from light_core.engine.loading import resolve_device, resolve_model
    from light_core.errors import ConfigError

    try:
        resolve_device(config.device)
    except ConfigError as error:
        report.problems.append(error)
        config = config.replace(device="cpu")
    try:
        return config, resolve_model(config)
    except ConfigError as error:
        if config.max_model_len is None:
            raise
        report.problems.append(error)
        config = config.replace(max_model_len=None)
        return config, resolve_model(config)


def _check_model(config: "EngineConfig", report: _Report) -> None:
    from light_core.engine.loading import bind_model

    config, resolved = _resolve(config, report)
    report.add("model", resolved.files.folder)
    report.add("architecture", ", ".join(resolved.files.architectures))
    owner = resolved.plugins.families.owner(resolved.family)
    report.add("plugin", f"{owner}, family {resolved.family.name}")
    report.add("device", f"{resolved.device}, {resolved.dtype}")
    runtime = bind_model(resolved, config, device="meta")
    for text in dict.fromkeys(f"{choice}" for choice in runtime.choices):
        report.add("kernel", text)
    weights = _parameter_bytes(runtime)
    report.add("weights", f"{weights / GIB:.2f} GiB in {resolved.dtype}")
    for check in (_check_checkpoint, _check_memory):
        try:
            check(config, resolved, runtime, weights, report)
        except LightError as error:
            report.problems.append(error)


def _parameter_bytes(runtime: "ModelRuntime") -> int:
    """Of all parameters, tied ones once."""
    from light_core.engine.weights import tie

    tie(runtime.modules, runtime.weight_plan.ties)
    unique = {id(parameter): parameter for module in runtime.modules.values() for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in unique.values())


def _check_checkpoint(config: "EngineConfig", resolved: "Resolved", runtime: "ModelRuntime", weights: int, report: _Report) -> None:
    del weights
    if config.load_format == "dummy":
        report.add("checkpoint", "none read: dummy weights")
        return
    from light_core.engine.weights import check_names, plan_files

    files = plan_files(runtime.weight_plan, resolved.files.folder)
    names = [name for file in files for name in _tensor_names(file)]
    check_names(runtime.modules, runtime.weight_plan, names, resolved.files.folder)
    report.add("checkpoint", f"{len(names)} tensors in {len(files)} file(s); every one has its place")


def _tensor_names(file: Path) -> list[str]:
    """Names in a safetensors header: 8 bytes of length, then JSON."""
    from light_core.errors import CheckpointError

    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise CheckpointError(f"{file} is not a safetensors file", str(error), "download it again") from error
    return [name for name in header if name != "__metadata__"]


def _check_memory(config: "EngineConfig", resolved: "Resolved", runtime: "ModelRuntime", weights: int, report: _Report) -> None:
    from light_core.engine.memory import MemoryBudget, cpu_budget, pool_slots
    from light_core.kv.layout import bytes_per_token

    limits, token_bytes = resolved.limits, bytes_per_token(runtime.kv_layout)
    if resolved.device == "cpu":
        budget = cpu_budget(weights)
    else:
        import torch

        free, total = torch.cuda.mem_get_info(resolved.device)
        budget = MemoryBudget(total, int(total * config.gpu_memory_utilization), weights + total - free)
    report.add("memory", f"{budget} (activations and graphs are measured at start)" if resolved.device != "cpu" else budget)
    slots = pool_slots(budget, token_bytes, config.max_total_tokens, limits.max_model_len, limits.max_num_seqs) - 1
    report.add(
        "KV", f"{slots} tokens of {token_bytes} bytes: {slots / limits.max_model_len:.1f} requests of {limits.max_model_len} at a time"
    )


def _check_port(host: str, port: int, report: _Report) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        from light_core.errors import ConfigError

        report.problems.append(
            ConfigError(f"port {port} on {host} cannot be taken", error.strerror or str(error), "give another --port or --host")
        )
    else:
        report.add("port", f"{host}:{port} is free")
