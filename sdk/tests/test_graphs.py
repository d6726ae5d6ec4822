"""Shapes that come back are captured once and replayed with what is in the batch now; all others run as they are."""

from contextlib import nullcontext

import pytest
import torch

from light_sdk.graphs import MAX_GRAPHS, PLANNED, SEEN, UNPLANNED, WARM_UPS, ShapeGraphs


def test_without_a_gpu_nothing_is_captured() -> None:
    graphs = ShapeGraphs(lambda shape, x: x * shape, 8, lambda: pytest.fail("takes memory of a GPU"))
    for _ in range(SEEN + 1):
        assert graphs(3, (torch.ones(2),)).tolist() == [3.0, 3.0]
    assert graphs.shapes == ()


class FakeTensor(torch.Tensor):
    """One that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class FakeGraph:
    """Records whether it is being captured; replaying it does again what `encode` below does."""

    owner: ShapeGraphs
    num_replays = 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "other threads go on"

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        FakeGraph.num_replays += 1
        ((shape, captured),) = ((shape, one) for shape, one in self.owner._graphs.items() if one.graph is self)
        captured.output.copy_(captured.inputs[0] * shape)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(FakeGraph, "num_replays", 0)


def on_gpu(*values: float) -> torch.Tensor:
    return torch.tensor(values).as_subclass(FakeTensor)


def test_a_shape_is_captured_once_and_replayed_in_shared_memory(gpu: None) -> None:
    calls: list[int] = []

    def encode(shape: int, x: torch.Tensor) -> torch.Tensor:
        calls.append(shape)
        return x * shape

    graphs = FakeGraph.owner = ShapeGraphs(encode, 4, lambda: (9, (on_gpu(0, 0, 0, 0),)))
    assert graphs(5, (on_gpu(1, 2),)).tolist() == [5, 10]
    assert calls == [9] * (WARM_UPS + 1) + [5] and graphs.shapes == (9,), "memory is taken before the first"
    for value in range(2, SEEN + 4):
        assert graphs(5, (on_gpu(value, 1),)).tolist() == [5 * value, 5]
        assert calls.count(5) == min(value, SEEN + 1), "as it is, then captured, then by the graph alone"
    kept = graphs(5, (on_gpu(3, 3),))
    graphs(5, (on_gpu(4, 4),))
    assert kept.tolist() == [15, 15] and FakeGraph.num_replays == 5
    (memory,) = {captured.inputs[0].data_ptr() for captured in graphs._graphs.values()}
    assert graphs._memory is not None and memory == graphs._memory.inputs[0].data_ptr()
    for _ in range(2 * SEEN):
        graphs(2, (on_gpu(1, 1, 1, 1, 1),))
    assert 2 not in graphs.shapes, "more rows than memory was taken for"


def test_nothing_is_captured_where_graphs_are_switched_off(gpu: None) -> None:
    graphs = ShapeGraphs(lambda shape, x: x * shape, 8, lambda: pytest.fail("takes memory for graphs"), captures=False)
    for value in range(2 * SEEN):
        assert graphs(3, (on_gpu(value),)).tolist() == [3 * value]
    assert graphs.shapes == ()


def test_a_failing_capture_leaves_the_encoder_at_work(gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(graph: FakeGraph) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGraph, "capture_end", fail)
    graphs = ShapeGraphs(lambda shape, x: x * shape, 8, lambda: (8, (on_gpu(0),)))
    for value in range(2 * SEEN):
        assert graphs(3, (on_gpu(value),)).tolist() == [3 * value]
    assert graphs.shapes == () and caplog.text.count("without CUDA graphs") == 1


def test_attention_is_planned_for_shapes_that_come_back(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("light_sdk.graphs.sdpa_kernel", lambda kernels, set_priority: asked.append(kernels) or nullcontext())
    graphs = ShapeGraphs(lambda shape, x: x * shape, 8, lambda: (8, (on_gpu(0),)), captures=False)
    for shape in (1, 2, 1, 1, 1):
        graphs(shape, (on_gpu(1),))
    assert asked == [UNPLANNED] * 3 + [PLANNED] * 2


def test_graphs_are_bounded_in_number(gpu: None) -> None:
    graphs = FakeGraph.owner = ShapeGraphs(lambda shape, x: x * shape, 1, lambda: (1000, (on_gpu(0),)))
    for shape in range(2 * MAX_GRAPHS):
        for value in range(SEEN + 2):
            assert graphs(shape, (on_gpu(value),)).tolist() == [shape * value]
    assert len(graphs.shapes) == MAX_GRAPHS


@pytest.mark.gpu
def test_a_shape_is_captured_when_it_has_come_back() -> None:
    calls: list[int] = []

    def encode(shape: int, x: torch.Tensor) -> torch.Tensor:
        calls.append(shape)
        return x * shape

    graphs = ShapeGraphs(encode, 8, lambda: (8, (torch.zeros(8, device="cuda"),)))
    for value in range(2 * SEEN):
        assert graphs(3, (torch.full((3,), float(value), device="cuda"),)).tolist() == [3.0 * value] * 3
    assert graphs.shapes == (8, 3) and calls.count(3) == SEEN + 1, "as it is, and once to capture; then none"
    kept = graphs(3, (torch.full((3,), 1.0, device="cuda"),))
    graphs(3, (torch.full((3,), 2.0, device="cuda"),))
    assert kept.tolist() == [3.0] * 3, "a result is not overwritten by the next"
    for _ in range(2 * SEEN):
        graphs(9, (torch.ones(9, device="cuda"),))
    assert 9 not in graphs.shapes, "larger than what memory was taken for"
