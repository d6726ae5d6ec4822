"""Do a model's kernels compile for a GPU that is not there, and what do they take of it?

    python -m light_sdk.testing.compiling FOLDER [--gpu h200] [--overrides '{"num_hidden_layers": 2}']

runs the steps that an engine starts and serves with (`light_core.engine.rehearsal`) without memory, compiles every Triton
kernel that they launch with the ptxas that Triton ships, and prints what each takes. No weights and no GPU are needed: a
folder with config.json does. In tests, `compiled_kernels` does the same in a process of its own, and `check_kernels` says
what is wrong with them.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from light_core.errors import LightError
from light_sdk.testing.descriptors import lost_descriptors

__all__ = ["KernelReport", "check_kernels", "compiled_kernels"]

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel, compiled.

    Attributes:
        name: of its function.
        step: the first step that launches it.
        constants: of its parameters, those that it was compiled for.
        num_warps: of a program.
        registers: of a thread.
        stack_bytes: of a thread: registers that were spilled to memory, and arrays.
        shared_bytes: of a program.
        lost_descriptors: products that do not read the shared memory that they were given (`descriptors.py`); [] where ptxas is
            right.
        error: what is wrong with it, and nothing else is known then.
        seconds: that it took; next to nothing where Triton's cache had it.
    """

    name: str
    step: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 0
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    lost_descriptors: Sequence[str] = ()
    error: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        thread, program = f"{self.registers} registers, {self.stack_bytes} bytes of stack", f"{self.shared_bytes} of shared memory"
        return f"{self.name}({constants}): " + (self.error or f"{thread}, {program}, {self.num_warps} warps")


def compiled_kernels(
    folder: Path | str,
    *,
    gpu: str = "h200",
    dtype: str = "bfloat16",
    overrides: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    model_plugin: str | None = None,
    num_steps: int | None = None,
) -> list[KernelReport]:
    """What a model's kernels take on a GPU, found out in a process of its own.

    Args:
        folder: with the model's config.json.
        gpu: one of `absent_gpu.GPUS`.
        dtype: of weights and activations.
        overrides: entries that replace those of config.json; fewer layers are faster, and alike layers are run once anyway.
        cache: Triton's cache, so that models share what they have in common; None takes a new one.
        model_plugin: as `EngineConfig.model_plugin`.
        num_steps: how many of the steps are run, the first of which is one decode, the second the largest prefill and the
            third the largest decode; None runs all.

    Returns:
        A report for each kernel, in the order of their first launch. Those that do not compile are among them, with their
        `error`; and those that are launched only when the steps are run again, so that no start-up can compile them ahead.

    Raises:
        LightError: the steps could not be run, because the model cannot be bound or reads a tensor on the host.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", __spec__.name, str(folder), "--gpu", gpu, "--dtype", dtype, "--json"]
    command += ["--overrides", json.dumps(dict(overrides or {}))]
    command += ["--model-plugin", model_plugin] if model_plugin else []
    command += ["--steps", str(num_steps)] if num_steps is not None else []
    with tempfile.TemporaryDirectory() as fresh:
        environment["TRITON_CACHE_DIR"] = str(cache or fresh)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise LightError(f"the kernels of {folder} are not known", done.stderr.strip()[-2000:], f"run {' '.join(command[:3])} … by hand")
    return [KernelReport(**record) for record in json.loads(done.stdout)]


def check_kernels(
    reports: Iterable[KernelReport], *, shared_bytes: int, stack_bytes: Mapping[str, int] = MappingProxyType({})
) -> list[str]:
    """What is wrong with `reports`, a line each; [] if all is well.

    Args:
        reports: from `compiled_kernels`.
        shared_bytes: that a program may take, `Gpu.shared_bytes` of the GPU.
        stack_bytes: that a thread may take, by the kernel's name; 0 for those that are not named.
    """
    wrong = []
    for report in reports:
        if report.error is not None:
            wrong.append(f"{report} (first launched in: {report.step})")
        elif report.lost_descriptors:
            wrong.append(f"{report}: ptxas lost the address of a factor: {report.lost_descriptors[0]}")
        elif report.shared_bytes > shared_bytes:
            wrong.append(f"{report}: only {shared_bytes} bytes of shared memory are there")
        elif report.stack_bytes > (allowed := stack_bytes.get(report.name, 0)):
            wrong.append(f"{report}: {allowed} bytes of stack are allowed")
    return wrong


# ---------------------------------------------------------------------------------------------- in the process of its own


def collect(
    folder: str, gpu_name: str, dtype: str, overrides: Mapping[str, Any], model_plugin: str | None, num_steps: int | None
) -> list[KernelReport]:
    """Runs the steps and compiles their kernels. What this leaves behind makes the process useless for anything else.

    Raises:
        Exception: whatever the steps raise.
    """
    from light_core.config import EngineConfig
    from light_core.engine.compilation import CompileQueue
    from light_core.engine.loading import resolve_model
    from light_core.engine.rehearsal import Rehearsal
    from light_sdk.testing.absent_gpu import GPUS, absent_gpu

    gpu = GPUS[gpu_name]
    config = EngineConfig(model=folder, model_plugin=model_plugin, load_format="dummy", dtype=dtype, hf_overrides=overrides)
    resolved = resolve_model(config, device="cuda:0")
    queue = CompileQueue(len(os.sched_getaffinity(0)))
    steps: list[str] = []
    with absent_gpu(gpu) as launches:
        with queue.collecting():
            for step in islice(Rehearsal(resolved, config, gpu.machine).steps(queue.launched), num_steps):
                steps += [step] * (len(queue.pending) - len(steps))
        reports = [_report(pending, step) for pending, step in zip(queue.pending, steps, strict=True)]
        if all(report.error is None for report in reports):
            reports += _late(islice(Rehearsal(resolved, config, gpu.machine).steps(launches), num_steps))
    return reports


def _late(steps: Iterable[str]) -> list[KernelReport]:
    """What is compiled while `steps` are run, when it should be there already."""
    from triton import knobs

    late: list[str] = []
    reports: list[KernelReport] = []
    knobs.compilation.listener = lambda *, src, **_: late.append(src.name)
    for step in steps:
        reports += [KernelReport(name, step, error="launched the second time that the steps are run, but not the first") for name in late]
        late.clear()
    knobs.compilation.listener = None
    return reports


def _report(pending: Any, step: str) -> KernelReport:
    began = time.perf_counter()
    try:
        kernel = pending.result()
    except Exception as error:  # Triton's, LLVM's or ptxas's: it is what is asked for
        return KernelReport(pending.function, step, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - began
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: _plain(value) for path, value in kernel.src.constants.items() if len(path) == 1}
    registers, stack_bytes = _resources(kernel.asm["cubin"])
    # Reading machine code takes a second for the largest kernels; only products by `wgmma` have descriptors.
    lost = lost_descriptors(kernel.asm["cubin"]) if "wgmma" in kernel.asm["ptx"] else []
    return KernelReport(
        kernel.name,
        step,
        constants,
        kernel.metadata.num_warps,
        registers,
        stack_bytes,
        kernel.metadata.shared,
        lost,
        seconds=round(seconds, 3),
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as CUDA's own tool reads them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, f"cuobjdump says {printed!r}"
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    from light_sdk.testing.absent_gpu import GPUS

    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="What a model's Triton kernels take on a GPU.")
    parser.add_argument("folder", help="folder with config.json, or a hub id")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON object whose entries replace those of config.json")
    parser.add_argument("--model-plugin")
    parser.add_argument("--steps", type=int, help="how many of the steps are run; all otherwise")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    given = parser.parse_args(arguments)
    reports = collect(given.folder, given.gpu, given.dtype, given.overrides, given.model_plugin, given.steps)
    print(json.dumps([dataclasses.asdict(report) for report in reports]) if given.json else "\n".join(map(str, reports)))
    wrong = check_kernels(reports, shared_bytes=GPUS[given.gpu].shared_bytes)
    if wrong and not given.json:
        print("\n" + "\n".join(wrong), file=sys.stderr)
    return 1 if wrong and not given.json else 0


if __name__ == "__main__":
    sys.exit(main())
