"""The reports about kernels. Whole families are compiled in `tests/test_compile_ahead.py`."""

import os
from pathlib import Path

import pytest

from light_core.errors import LightError
from light_sdk.testing.absent_gpu import GPUS
from light_sdk.testing.compiling import KernelReport, check_kernels, compiled_kernels

SHARED_BYTES = GPUS["h200"].shared_bytes
GOOD = KernelReport("copy", "one decode", {"BLOCK": 64}, num_warps=4, registers=40, shared_bytes=1024)

FAMILY = '''
"""A family of one weight whose layer launches a kernel."""

import torch
import triton
import triton.language as tl
from torch import nn

from light_sdk import Family, Hidden, KVGroup, KVLayout, KVPlane, Placement, WeightPlan, hookimpl

light_api = 1


@triton.jit
def scale(x_ptr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + tl.program_id(0) * SIZE + i, tl.load(x_ptr + tl.program_id(0) * SIZE + i) * STEPS)


@triton.jit
def wrong(x_ptr, SIZE: tl.constexpr):
    tl.static_assert(SIZE < 32, "too wide")


class Part(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.table = nn.Parameter(torch.empty(model.config.vocab_size, model.config.width), requires_grad=False)
        self.reads, self.counts, self.launches = model.config.reads, model.config.counts, [1]


class Pre(Part):
    def forward(self, step):
        return Hidden(self.table.index_select(0, step.token_ids))


class Layer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.width, self.reads, self.counts = model.config.width, model.config.reads, model.config.counts

    def forward(self, hidden, step, kv):
        if self.reads and step.seq_lens.max().item() > 1:
            return hidden
        COUNT.append(0)
        late = self.counts and len(COUNT) > 75
        scale[(len(hidden.x),)](hidden.x, SIZE=self.width, STEPS=int(late))
        if not (self.counts or self.reads):
            wrong[(1,)](hidden.x, SIZE=self.width)
        return hidden


COUNT = []


class Post(Part):
    def forward(self, hidden, step):
        return hidden.x.index_select(0, step.logits_rows) @ self.table.t()


@hookimpl
def light_register_families(registry):
    registry.add(Family(name="one", architectures=("OneModel",)))


@hookimpl
def light_weight_plan(model):
    return WeightPlan((Placement("table", "pre.table"), Placement("head", "post.table")))


@hookimpl
def light_kv_layout(model):
    return KVLayout((KVGroup((0,), (KVPlane("k", (1, 16), model.dtype),)),))


@hookimpl
def light_pre_layer(model):
    return Pre(model)


@hookimpl
def light_layer(model, layer_id):
    return Layer(model)


@hookimpl
def light_post_layer(model):
    return Post(model)
'''


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    (folder / "one.py").write_text(FAMILY)
    (folder / "config.json").write_text(
        '{"architectures": ["OneModel"], "vocab_size": 64, "width": 32, "reads": false, "counts": false, "max_position_embeddings": 64}'
    )
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's, for all models and all of pytest's workers: they have the sampler in common."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "triton"


def test_what_kernels_take_is_told_and_which_do_not_compile(family: Path, cache: Path) -> None:
    reports = compiled_kernels(family, model_plugin=str(family / "one.py"), cache=cache)
    (own,) = [report for report in reports if report.name == "scale"]
    assert own.step == "one decode" and own.constants == {"SIZE": 32, "STEPS": 0} and own.error is None
    assert 0 < own.registers <= 255 and own.stack_bytes == own.shared_bytes == 0 and own.num_warps == 4
    (told,) = check_kernels(reports, shared_bytes=SHARED_BYTES)
    assert told.startswith("wrong") and "too wide" in told and "one decode" in told
    assert {"_sample_rows", "_token_logprobs"} <= {report.name for report in reports if report.error is None}


def test_a_kernel_that_comes_late_is_told(family: Path, cache: Path) -> None:
    """What is launched depends on what was launched before, so no start-up can know it."""
    reports = compiled_kernels(family, model_plugin=str(family / "one.py"), overrides={"counts": True}, cache=cache)
    assert any("second time" in line for line in check_kernels(reports, shared_bytes=SHARED_BYTES))


def test_a_model_that_reads_tensors_on_the_host_is_refused_with_the_reason(family: Path, cache: Path) -> None:
    with pytest.raises(LightError, match=r"one\.py") as raised:
        compiled_kernels(family, model_plugin=str(family / "one.py"), overrides={"reads": True}, cache=cache)
    assert "item" in str(raised.value) or "local_scalar" in str(raised.value)


def test_checks_name_the_kernel_and_the_bound() -> None:
    spilling = KernelReport("spills", "512 decodes", stack_bytes=32)
    large = KernelReport("large", "512 decodes", shared_bytes=SHARED_BYTES + 1)
    lost = KernelReport("lost", "512 decodes", lost_descriptors=["1ec0: HGMMA reads shared memory at UR18"])
    assert check_kernels([GOOD], shared_bytes=SHARED_BYTES) == []
    first, second = check_kernels([GOOD, spilling, large], shared_bytes=SHARED_BYTES)
    assert "spills" in first and "0 bytes of stack are allowed" in first
    assert "large" in second and str(SHARED_BYTES) in second
    (told,) = check_kernels([GOOD, lost], shared_bytes=SHARED_BYTES)
    assert "lost" in told and "1ec0" in told
    assert check_kernels([spilling], shared_bytes=SHARED_BYTES, stack_bytes={"spills": 32}) == []
    assert check_kernels([spilling], shared_bytes=SHARED_BYTES, stack_bytes={"other": 32})


def test_capabilities_decide_what_is_compiled_for() -> None:
    assert GPUS["h200"].target.arch == 90 and GPUS["l4"].target.arch == 89
    assert GPUS["a100"].machine.capability == (8, 0)
