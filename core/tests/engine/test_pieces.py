"""What may be replayed between the calls of ops that are given the step. Graphs themselves: `tests/test_gpu.py`."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from light_core.engine.pieces import NotByTokens, piece_sizes, run_by_tokens, run_layers
from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Hidden, KVView, Step


def mean_of_request(out_TE: torch.Tensor, x_TE: torch.Tensor, step: Step) -> None:
    """Depends on who is in the step."""
    for first, stop in zip(step.cu_seqlens_q.tolist(), step.cu_seqlens_q[1:].tolist()):
        out_TE[first:stop] = x_TE[first:stop].mean(0)


def new_mean_of_request(x_TE: torch.Tensor, step: Step) -> torch.Tensor:
    out_TE = torch.empty_like(x_TE)
    mean_of_request(out_TE, x_TE, step)
    return out_TE


def doubled(x_TE: torch.Tensor) -> torch.Tensor:
    return x_TE * 2


class Layer:
    """Doubles, adds the mean of the request and what `also` says."""

    def __init__(self, ops: OpTable, also: Callable[[Step], Any] = lambda step: step.shared["bias"]) -> None:
        self.doubled, self.mean, self.new_mean = (ops.select(name) for name in ("doubled", "mean", "new_mean"))
        self.also, self.calls = also, self.mean

    def __call__(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x = self.doubled(hidden.x)
        out = torch.empty_like(x)
        self.calls(out, x, step)
        return Hidden(x + out + self.also(step))


@pytest.fixture
def ops() -> OpTable:
    registry = KernelRegistry()
    registry.op("doubled", f"{__name__}:doubled")
    registry.op("mean", f"{__name__}:mean_of_request")
    registry.op("new_mean", f"{__name__}:new_mean_of_request")
    registry.finish()
    return OpTable(registry, Machine("cpu"), "float32")


def step_of(*lens: int) -> Step:
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    tokens = torch.arange(sum(lens), dtype=torch.int32)
    other = torch.zeros(1, dtype=torch.int32)
    return Step(
        token_ids=tokens,
        positions=tokens,
        context_lens=tokens + 1,
        slots=tokens.long(),
        cu_seqlens_q=starts,
        seq_lens=torch.tensor(lens),
        rows=other,
        slot_table=other[None],
        logits_rows=other.long(),
        num_decodes=0,
        max_query_len=max(lens),
        max_seq_len=max(lens),
        shared={"bias": tokens[:, None] / 8},
    )


def runtime_of(ops: OpTable, *layers: Layer) -> Any:
    return SimpleNamespace(model=SimpleNamespace(ops=ops), layers=(*layers, None))


def test_ops_are_given_the_step_and_layers_its_tokens(ops: OpTable) -> None:
    runtime = runtime_of(ops, Layer(ops), Layer(ops, lambda step: step.positions[:, None] / step.num_tokens))
    kv, step = [{}] * 3, step_of(3, 1, 4)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    expected = run_layers(runtime, kv, Hidden(x), step)
    found = run_by_tokens(runtime, kv, Hidden(x), dict(step.shared), step)
    assert torch.equal(found.x, expected.x)
    assert not torch.equal(run_by_tokens(runtime, kv, Hidden(x), dict(step.shared), step_of(4, 4)).x, expected.x)


def test_the_step_may_be_a_keyword_argument(ops: OpTable) -> None:
    layer, step, x = Layer(ops), step_of(2, 3), torch.ones(5, 2)
    expected = run_layers(runtime_of(ops, layer), [{}] * 2, Hidden(x), step).x
    layer.calls = lambda out, x, step: layer.mean(out, x, step=step)
    assert torch.equal(run_by_tokens(runtime_of(ops, layer), [{}] * 2, Hidden(x), dict(step.shared), step).x, expected)


@pytest.mark.parametrize("name", ["num_decodes", "seq_lens", "rows", "cu_seqlens_q", "prompt_lens", "prefill_lens", "media", "max_seq_len"])
def test_layers_that_read_requests_are_found_out(ops: OpTable, name: str) -> None:
    runtime, step = runtime_of(ops, Layer(ops, lambda step: getattr(step, name))), step_of(2)
    with pytest.raises(NotByTokens, match=rf"step\.{name}"):
        run_by_tokens(runtime, [{}] * 2, Hidden(torch.ones(2, 2)), dict(step.shared), step)


def test_ops_that_make_a_tensor_of_the_step_are_found_out(ops: OpTable) -> None:
    """A graph that comes after would read the tensor of the step that was recorded."""
    layer, step = Layer(ops), step_of(2)
    layer.calls = lambda out, x, step: layer.new_mean(x, step)
    with pytest.raises(NotByTokens, match="returns something"):
        run_by_tokens(runtime_of(ops, layer), [{}] * 2, Hidden(torch.ones(2, 2)), dict(step.shared), step)


def test_recording_ends_with_its_block(ops: OpTable) -> None:
    seen, step, out = [], step_of(2), torch.zeros(2, 2)
    mean = ops.select("mean")
    with pytest.raises(KeyError), ops.recording(lambda op, args, options: seen.append(op)):
        mean(out, torch.ones(2, 2), step)
        raise KeyError
    assert seen == [mean_of_request] and not out.any()
    mean(out, torch.ones(2, 2), step)
    assert out.all() and len(seen) == 1


@pytest.mark.parametrize("most", [1, 16, 40, 300, 1000, 1024, 3072])
def test_sizes_leave_little_padding(most: int) -> None:
    sizes = piece_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for fewer, more in itertools.pairwise(sizes):
        assert more - fewer <= max(64, math.ceil(more / 5) + 32), (fewer, more)
