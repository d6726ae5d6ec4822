"""CUDA's own start, in threads while modules are imported and configuration, plugins and weights are read: it takes seconds,
most of them outside of Python.

The driver comes first, and without torch, which would keep Python's lock while it waits for it: no thread could go on.

What the first use of a GPU creates belongs to the process or to the GPU, not to the thread: the context, cuBLAS's handle
and workspace, pinned memory, cuDNN's kernels. Nothing here is needed; what fails here fails again, and is told, where it is.
"""

import contextlib
import ctypes
import logging
import threading
from collections.abc import Set
from typing import Any

__all__ = ["start_device", "start_driver", "start_libraries"]

logger = logging.getLogger(__name__)

SIDE = 64
DRIVER = "libcuda.so.1"
CUDNN_ATTENTION = "aten._scaled_dot_product_cudnn_attention.default"


def start_driver(asked: str) -> None:
    """Begins to start the driver, if one is there and `asked` (as `EngineConfig.device`) allows it. Takes no memory of a GPU,
    imports no torch, and may be called any number of times."""
    if asked != "cpu":
        threading.Thread(target=_init_driver, name="driver", daemon=True).start()


def _init_driver() -> None:
    with contextlib.suppress(OSError):  # no driver: torch finds that out too, and says it where it matters
        ctypes.CDLL(DRIVER).cuInit(0)


def start_device(asked: str) -> threading.Thread:
    """Begins to use the GPU, if one is there and `asked` (as `EngineConfig.device`) allows it; join the thread before
    kernels are launched."""
    thread = threading.Thread(target=_start, args=(asked,), name="device", daemon=True)
    thread.start()
    return thread


def _start(asked: str) -> None:
    import torch

    try:
        if asked == "cpu":
            return
        _init_driver()
        if not torch.cuda.is_available():
            return
        square = torch.zeros((SIDE, SIDE), dtype=torch.float16, device="cuda:0")
        torch.mm(square, square)
        torch.empty(1, pin_memory=True)
        torch.cuda.synchronize(square.device)
    except Exception:  # a broken driver or a full GPU: whoever needs it says so
        logger.debug("the device was not started early", exc_info=True)


def start_libraries(ops: Set[Any]) -> threading.Thread | None:
    """Begins to load what torch loads when one of `ops` is first called on the GPU and `start_device` has not called; join the
    thread as that one's. None where there is nothing of the kind."""
    import torch

    if CUDNN_ATTENTION not in map(str, ops) or not torch.cuda.is_available():
        return None
    thread = threading.Thread(target=_load_cudnn, name="cudnn", daemon=True)
    thread.start()
    return thread


def _load_cudnn() -> None:
    import torch

    try:
        q = torch.zeros((1, 1, SIDE, SIDE), dtype=torch.float16, device="cuda:0")
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, True, False, scale=1.0)
        torch.cuda.synchronize(q.device)
    except Exception:  # a shape that this cuDNN does not take
        logger.debug("cuDNN was not started early", exc_info=True)
