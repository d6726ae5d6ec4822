"""`light collect-env`: what a bug report needs."""

import os
import platform
import shutil
import subprocess

import click
import importlib_metadata
import psutil

from light_core import __version__

__all__ = ["collect_env"]

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pluggy", "fastapi", "uvicorn", "pyzmq", "msgspec", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HOME", "TRITON_INTERPRET", "OMP_NUM_THREADS")
QUERY = "--query-gpu=name,driver_version,memory.total,memory.free"


def collect_env() -> None:
    """Prints versions, plugins, processor, memory and GPUs, one a line."""
    rows = [("light", __version__), ("python", platform.python_version()), ("system", platform.platform())]
    rows += [(name, _version(name)) for name in PACKAGES]
    points = importlib_metadata.entry_points(group="light.plugins")
    rows += [(f"plugin {point.name}", f"{point.dist.name} {point.dist.version}" if point.dist else "?") for point in points]
    memory = psutil.virtual_memory()
    rows.append(("processor", f"{_processor()}, {psutil.cpu_count()} cores"))
    rows.append(("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} available"))
    rows += [(f"gpu {index}", text) for index, text in enumerate(_gpus())] or [("gpu", "none found")]
    rows += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}")


def _version(name: str) -> str:
    try:
        return str(importlib_metadata.version(name))
    except importlib_metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.machine()


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", QUERY, "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
