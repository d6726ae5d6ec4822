"""A profile of torch's operators, and names of kernels to kinds of work."""

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import Interval

from light_core.bench.kernels import KernelTime, kernel_times, kind_of, named_ops, op_kernels, profile_kernels
from light_core.ops import Choice


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNN", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "products"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<int>>", "elementwise"),
        ("aten::mul", "elementwise"),
        ("_my_kernel", "my_op"),
        ("something", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name, {"_my_kernel": "my_op"}) == kind


def test_a_profile_has_every_operator() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)

    def run() -> None:
        for _ in range(4):
            torch.mm(a, b).sin_()

    times = {one.name: one for one in profile_kernels(run, 2, torch.device("cpu"), {})}
    assert times["aten::mm"].calls == 2 and times["aten::sin_"].calls == 2, "in each of two steps"
    assert times["aten::mm"].kind == "products" and times["aten::mm"].ms > 0
    assert list(times) == sorted(times, key=lambda name: -times[name].ms)


def test_of_a_gpu_its_own_events_count() -> None:
    """And what runs beside the kernel before it counts from that one's end: times and gaps add up to the step."""

    def event(name: str, device: DeviceType, begin: float, end: float, **more: Any) -> Any:
        fields = {"name": name, "device_type": device, "time_range": Interval(begin, end), "is_user_annotation": False}
        return SimpleNamespace(**fields | more)

    events = [
        event("_early_kernel", DeviceType.CUDA, 150.0, 190.0),
        event("_my_kernel", DeviceType.CUDA, 100.0, 130.0),
        event("_my_kernel", DeviceType.CUDA, 130.0, 180.0),
        event("_within_kernel", DeviceType.CUDA, 160.0, 170.0),
        event("Memcpy DtoH (Device -> Pinned)", DeviceType.CUDA, 200.0, 202.0),
        event("cudaGraphLaunch", DeviceType.CPU, 0.0, 500.0),
        event("a range", DeviceType.CUDA, 0.0, 900.0, is_user_annotation=True),
    ]
    assert kernel_times(events, 2, True, {"_my_kernel": "my_op"}) == [
        KernelTime("_my_kernel", "my_op", 0.04, 1.0),
        KernelTime("_early_kernel", "other", 0.005, 0.5),
        KernelTime("Memcpy DtoH (Device -> Pinned)", "copies", 0.001, 0.5),
        KernelTime("_within_kernel", "other", 0.0, 0.5),
    ]


class FakeKernel:
    """As Triton's: a function within, and maybe a tuner around."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn


FakeKernel.__module__ = "triton.runtime.jit"


def test_triton_kernels_are_known_by_their_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel() -> None: ...

    def borrowed() -> None: ...

    kernel.__module__ = "somewhere.ops.rotate.kernel"
    module: Any = ModuleType("somewhere.ops.rotate.kernel")
    module.launch, module.tuned, module.borrowed = (lambda: None), FakeKernel(FakeKernel(kernel)), FakeKernel(borrowed)
    module.launch.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    choice = Choice("rotate", "triton", {"width": 3}, "")
    ops = SimpleNamespace(select=lambda op, **facts: {("rotate", 3): module.launch}[op, facts["width"]])
    found = op_kernels(SimpleNamespace(choices=(choice,), model=SimpleNamespace(ops=ops)))  # type: ignore[arg-type]
    assert found["kernel"] == "rotate" and "borrowed" not in found


def test_what_an_op_does_is_its_own() -> None:
    a = torch.randn(64, 64)

    def implementation() -> None:
        torch.mm(a, a)
        time.sleep(0.005)  # as compiled code, which no profiler sees

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._op = implementation

    layer = Layer()
    ops = SimpleNamespace(select=lambda op, **facts: implementation)
    runtime: Any = SimpleNamespace(
        choices=(Choice("my_op", "any", {}, ""),), model=SimpleNamespace(ops=ops), modules={"layers.0": torch.nn.Sequential(layer)}
    )

    def run() -> None:
        layer._op()
        torch.mm(a, a)

    with named_ops(runtime):
        times = profile_kernels(run, 1, torch.device("cpu"), {})
    kinds = {(one.name, one.kind): one for one in times}
    assert kinds["aten::mm", "my_op"].calls == 1 and kinds["aten::mm", "products"].calls == 1
    assert kinds["light op my_op", "my_op"].ms > 4.9 and layer._op is implementation
