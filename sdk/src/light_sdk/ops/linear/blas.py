"""Products of many tokens by cuBLASLt, with the algorithm that was measured to be the fastest of all that it has.

torch's product takes the algorithm that cuBLAS guesses from the shape. Of some shapes another one is faster by 5 to 25 %
(H200, docs/decisions/0017), and it can be named: by its tile, its cluster and what else tells cuBLAS's kernels apart. Such
names stand in the data files of `tuning.py`, for one version of cuBLAS, as the next may have others. Where they have none,
and on other versions, the product is torch's.

The library is the one that torch has loaded. Not in it: the choice of kernels for a few tokens (`kernel.py`).
"""

import ctypes
import functools
import logging
import os
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal

import torch
import torch.nn.functional as F

from light_core.engine.fakes import is_fake
from light_sdk.ops.tuning import device_name, entry_for, read_configs

__all__ = ["Algorithm", "Kind", "Product", "product", "product_to", "suggested_algorithms", "tuned_algorithm", "version"]

logger = logging.getLogger(__name__)

PACKAGE = "light_sdk.ops.linear"
WORKSPACE_BYTES = 1 << 20
ALIGNMENT = 256
"""Bytes, of addresses: what cuBLAS's algorithms may take for granted unless told otherwise."""
COMPUTE_32F, REAL_32F, REAL_16BF, TRANSPOSED = 68, 0, 14, 1
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8
"""Of a product's attributes."""
ADD_BIAS = 4
"""The epilogue that adds a number to each row of cuBLAS's result, which is a column of torch's."""
COLUMNS = 3
"""Of a matrix's."""
ALGORITHM_WORDS, RESULT_WORDS = 8, 12
MOST_WORKSPACE, MAX_SUGGESTED = 1, 16
ATTRIBUTES = {"id": 0, "tile": 1, "split_k": 2, "sums": 3, "custom": 5, "stages": 6, "cluster": 8}
"""Of an algorithm: cuBLAS's number of each."""
SPLIT_SUMS = 2
"""How parts along K are added up: in float32, in the workspace."""
HOPPER_KERNELS, HOPPER_STAGES = 66, 35
"""cuBLAS's id of its kernels for Hopper, and of "as many stages as fit"."""


Kind = Literal["plain", "onto", "biased"]
"""Of a product: `x @ weight.T` alone, added to what is there, or with a bias."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One of cuBLASLt's kernels for Hopper, by attributes of `cublasLtMatmulAlgoConfigAttributes_t`.

    Attributes:
        tile: `cublasLtMatmulTile_t`.
        cluster: `cublasLtClusterShape_t`.
        custom: what cuBLAS does not name: the order of tiles, and which operand a pair of warp groups shares.
        split_k: parts along K.
    """

    tile: int
    cluster: int
    custom: int = 0
    split_k: int = 1


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As the reference of `linear`."""
    found = _find(x, weight, "plain" if bias is None else "biased")
    if found is None or (bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous() or bias.data_ptr() % ALIGNMENT)):
        return F.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    found(x, weight, out, bias)
    return out


def product_to(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, adds: bool = False) -> None:
    """Overwrites `out` `[T, N]`, contiguous, with `x @ weight.T`, or where it `adds` with `out + x @ weight.T`."""
    found = _find(x, weight, "onto" if adds else "plain")
    if found is not None and out.data_ptr() % ALIGNMENT == 0:
        found(x, weight, out)
    elif adds:
        torch.addmm(out, x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)


def tuned_algorithm(entries: dict[str, Any], num_tokens: int) -> Algorithm | None:
    """The algorithm for `num_tokens`, by `entry_for`: None where torch's own product is as fast."""
    entry = entry_for(entries, num_tokens)
    return None if entry is None else Algorithm(**entry)


def suggested_algorithms(n: int, k: int, num_tokens: int) -> set[Algorithm]:
    """What cuBLAS would take for a product of that shape, and what it thinks nearly as good; on the current CUDA device."""
    cublas, preference, count = _cublas(), ctypes.c_void_p(), ctypes.c_int()
    results = (ctypes.c_uint64 * RESULT_WORDS * MAX_SUGGESTED)()
    description, matrices = _description(), [_matrix(k, n), _matrix(k, num_tokens), _matrix(n, num_tokens)]
    _must(cublas.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
    limit = ctypes.c_uint64(WORKSPACE_BYTES)
    _must(cublas.cublasLtMatmulPreferenceSetAttribute(preference, MOST_WORKSPACE, ctypes.byref(limit), ctypes.c_size_t(8)))
    arguments = (_handle(torch.cuda.current_device()), description, *matrices, matrices[-1], preference, MAX_SUGGESTED, results)
    status = cublas.cublasLtMatmulAlgoGetHeuristic(*arguments, ctypes.byref(count))
    cublas.cublasLtMatmulPreferenceDestroy(preference)
    cublas.cublasLtMatmulDescDestroy(description)
    for matrix in matrices:
        cublas.cublasLtMatrixLayoutDestroy(matrix)
    _must(status)
    found = [_attributes(result) for result in results[: count.value]]
    return {
        Algorithm(attributes["tile"], attributes["cluster"], attributes["custom"], attributes["split_k"])
        for attributes in found
        if attributes["id"] == HOPPER_KERNELS
    }


class Product:
    """Products of one weight's shape by one algorithm, on the current CUDA device.

    Args:
        algorithm: to take.
        n: rows of the weight.
        k: its columns.
        most_tokens: that `x` will have.
        kind: of product.

    Raises:
        ValueError: cuBLAS does not have the algorithm for this shape, or it needs more than `WORKSPACE_BYTES`, which all
            products of a device share, as they follow each other in one stream.
    """

    def __init__(self, algorithm: Algorithm, n: int, k: int, most_tokens: int, kind: Kind) -> None:
        self._cublas, device = _cublas(), torch.cuda.current_device()
        self._handle, self._description, self._workspace = _handle(device), _description(), _workspace(device)
        self._is_biased = kind == "biased"
        if self._is_biased:
            _set(self._description, EPILOGUE, ctypes.c_int32(ADD_BIAS))
            _set(self._description, BIAS_POINTER, ctypes.c_void_p(self._workspace.data_ptr()))  # any, while it is checked
        self._weight, self._x, self._out = _matrix(k, n), _matrix(k, most_tokens), _matrix(n, most_tokens)
        self._num_tokens, self._lock = most_tokens, Lock()
        self._one, self._beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if kind == "onto" else 0.0)
        self._algorithm = self._named(algorithm)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Writes `x @ weight.T`, with `bias` where the kind has one, or adds it, to `out`.

        Args:
            x: `[T, K]` bfloat16, contiguous, at a multiple of `ALIGNMENT` bytes, as the others are.
            weight: `[N, K]`.
            out: `[T, N]`.
            bias: `[N]`, contiguous, if and only if the kind is "biased".
        """
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        out_matrix, out_ptr = self._out, ctypes.c_void_p(out.data_ptr())
        with self._lock:
            self._set_tokens(x.shape[0])
            if self._is_biased:
                assert bias is not None
                _set(self._description, BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
            _must(
                self._cublas.cublasLtMatmul(
                    *(self._handle, self._description, ctypes.byref(self._one)),
                    *(ctypes.c_void_p(weight.data_ptr()), self._weight, ctypes.c_void_p(x.data_ptr()), self._x),
                    *(ctypes.byref(self._beta), out_ptr, out_matrix, out_ptr, out_matrix, self._algorithm),
                    *(ctypes.c_void_p(self._workspace.data_ptr()), ctypes.c_size_t(self._workspace.numel()), stream),
                )
            )

    def _set_tokens(self, num_tokens: int) -> None:
        if num_tokens != self._num_tokens:
            columns = ctypes.c_uint64(num_tokens)
            for matrix in (self._x, self._out):
                _must(self._cublas.cublasLtMatrixLayoutSetAttribute(matrix, COLUMNS, ctypes.byref(columns), ctypes.c_size_t(8)))
            self._num_tokens = num_tokens

    def _named(self, algorithm: Algorithm) -> Any:
        named, checked = (ctypes.c_uint64 * ALGORITHM_WORDS)(), (ctypes.c_uint64 * RESULT_WORDS)()
        types = (COMPUTE_32F, REAL_32F, *(REAL_16BF,) * 4)
        status = self._cublas.cublasLtMatmulAlgoInit(self._handle, *types, HOPPER_KERNELS, named)
        sums = SPLIT_SUMS if algorithm.split_k > 1 else 0
        for name, value in {**asdict(algorithm), "sums": sums, "stages": HOPPER_STAGES}.items():
            stored, size = _attribute(name, value)
            status = status or self._cublas.cublasLtMatmulAlgoConfigSetAttribute(named, ATTRIBUTES[name], ctypes.byref(stored), size)
        matrices = (self._weight, self._x, self._out, self._out)
        status = status or self._cublas.cublasLtMatmulAlgoCheck(self._handle, self._description, *matrices, named, checked)
        if status or checked[ALGORITHM_WORDS] > self._workspace.numel():
            raise ValueError(f"cuBLASLt {version()} has no {algorithm} for this shape (status {status})")
        return named


def _find(x: torch.Tensor, weight: torch.Tensor, kind: Kind) -> Product | None:
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype or x.dim() != 2 or not x.is_cuda or is_fake(x) or is_fake(weight):
        return None
    tuned = _tuned(x.device, *weight.shape, kind, x.shape[0])
    if tuned is None or x.device.index != torch.cuda.current_device():
        return None
    is_plain = all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 for tensor in (x, weight))
    return _product(*tuned, x.device) if is_plain else None


@functools.lru_cache(maxsize=1 << 14)
def _tuned(device: torch.device, n: int, k: int, kind: Kind, num_tokens: int) -> tuple[Algorithm, int, int, int, Kind] | None:
    """What a `Product` for so many tokens is made of; None where it is torch's."""
    measured = read_configs(PACKAGE, device_name(device)).get("blas")
    if not measured or version() != measured["version"]:
        return None
    entries = measured[kind].get(f"{n}x{k}", {})
    algorithm = tuned_algorithm(entries, num_tokens)
    return None if algorithm is None else (algorithm, n, k, max(map(int, entries)), kind)


@functools.cache
def _product(algorithm: Algorithm, n: int, k: int, most_tokens: int, kind: Kind, device: torch.device) -> Product | None:
    """On `device`, the current one; None where cuBLAS does not have it after all."""
    try:
        return Product(algorithm, n, k, most_tokens, kind)
    except ValueError as error:
        logger.warning("torch's product is taken for weights of %d x %d: %s", n, k, error)
        return None


def _attribute(name: str, value: int = 0) -> tuple[Any, ctypes.c_size_t]:
    """Memory of one attribute of an algorithm, and its bytes."""
    stored = ctypes.c_uint16(value) if name == "cluster" else ctypes.c_uint32(value)
    return stored, ctypes.c_size_t(ctypes.sizeof(stored))


def _attributes(algorithm: Any) -> dict[str, int]:
    found, written = {}, ctypes.c_size_t()
    for name, number in ATTRIBUTES.items():
        stored, size = _attribute(name)
        _must(_cublas().cublasLtMatmulAlgoConfigGetAttribute(algorithm, number, ctypes.byref(stored), size, ctypes.byref(written)))
        found[name] = int(stored.value)
    return found


@functools.cache
def version() -> int:
    """Of the cuBLASLt that torch has loaded: 130100 for 13.1.0; 0 if there is none."""
    try:
        return int(_cublas().cublasLtGetVersion())
    except OSError:
        return 0


@functools.cache
def _cublas() -> Any:
    major = (torch.version.cuda or "0").split(".")[0]
    library = ctypes.CDLL(f"libcublasLt.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return library


@functools.cache
def _handle(device_index: int) -> ctypes.c_void_p:
    """Kept for as long as the process lives, as torch keeps its own."""
    handle = ctypes.c_void_p()
    _must(_cublas().cublasLtCreate(ctypes.byref(handle)))
    return handle


def _description() -> ctypes.c_void_p:
    """`weight` transposed by `x`, summed in float32: columns of cuBLAS are rows of torch."""
    description = ctypes.c_void_p()
    _must(_cublas().cublasLtMatmulDescCreate(ctypes.byref(description), COMPUTE_32F, REAL_32F))
    _set(description, TRANSPOSE_A, ctypes.c_int32(TRANSPOSED))
    return description


def _set(description: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _must(_cublas().cublasLtMatmulDescSetAttribute(description, attribute, ctypes.byref(value), size))


@functools.cache
def _workspace(device_index: int) -> torch.Tensor:
    assert not torch.cuda.is_current_stream_capturing(), "run the op once before it is captured"
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device_index}")


def _matrix(rows: int, columns: int) -> ctypes.c_void_p:
    matrix = ctypes.c_void_p()
    sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))
    _must(_cublas().cublasLtMatrixLayoutCreate(ctypes.byref(matrix), REAL_16BF, *sizes))
    return matrix


def _must(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt failed with status {status}")
