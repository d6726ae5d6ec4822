"""Shapes that come back are captured once and replayed with what is in the pictures now; all others run as they are."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from light_qwen_vl.graphs import PLANNED, SEEN, UNPLANNED, WARM_UPS, ShapeGraphs
from light_qwen_vl.images import cut_patches
from light_qwen_vl.model import batches
from light_sdk.testing.loading import load_model

TEXT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "image_token_id": 100,
}
QWEN2 = {"depth": 2, "num_heads": 2, "embed_dim": 128, "hidden_size": 64}
QWEN2_5 = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 128,
    "out_hidden_size": 64,
    "intermediate_size": 170,
    "fullatt_block_indexes": [1],
}
CONFIGS = {
    "qwen2-vl": {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", **TEXT, "vision_config": QWEN2},
    "qwen2.5-vl": {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **TEXT, "vision_config": QWEN2_5},
}


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
    monkeypatch.setattr("light_qwen_vl.graphs.sdpa_kernel", lambda kernels, set_priority: asked.append(kernels) or nullcontext())
    graphs = ShapeGraphs(lambda shape, x: x * shape, 8, lambda: (8, (on_gpu(0),)), captures=False)
    for shape in (1, 2, 1, 1, 1):
        graphs(shape, (on_gpu(1),))
    assert asked == [UNPLANNED] * 3 + [PLANNED] * 2


def test_large_pictures_are_encoded_alone_and_small_ones_by_shape() -> None:
    assert batches([(2, 3), (9, 9), (1, 4), (2, 3), (8, 8)], 64) == [[2, 0, 3], [1], [4]]
    assert batches([(8, 8)], 64) == [[0]] and batches([(1, 1)], 64) == [[0]]


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_do_not_see_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever batches they are encoded, in their order."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    write_weights(tmp_path)
    (encoder,) = load_model(tmp_path, ("light_qwen.hooks", "light_qwen_vl.hooks")).media_encoders
    items = [picture(encoder, seed, size) for seed, size in enumerate(((200, 130), (90, 310), (60, 60), (200, 130)))]
    with torch.inference_mode():
        expected = torch.cat([encoder.module([item]) for item in items])
        for large in (10_000, 100, 1):
            monkeypatch.setattr("light_qwen_vl.model.LARGE", large)
            torch.testing.assert_close(encoder.module(items), expected, atol=1e-5, rtol=0)


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_by_a_graph_are_those_without(name: str, tmp_path: Path) -> None:
    """Different pictures of one shape, one and two at a time, in float32 and in bfloat16."""
    config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path)
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.05)):
        (encoder,) = load_model(tmp_path, ("light_qwen.hooks", "light_qwen_vl.hooks"), dtype, "cuda").media_encoders
        module: Any = encoder.module
        for seed in range(2 * SEEN):
            items = [picture(encoder, seed + 10 * index, size) for index, size in enumerate(((200, 130), (90, 310)))]
            for batch in ([items[0]], items):
                with torch.inference_mode():
                    grids = tuple(encoder.grid(item) for item in batch)
                    expected = torch.cat([eager(module, item) for item in batch])
                    found = module(batch)
                error = (found - expected).float().abs().max() / expected.float().abs().max()
                assert error <= bound, f"{dtype}, {grids}: off by {error:.3g} of the largest"
        assert len(module.graphs.shapes) == 3


def eager(module: Any, item: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = tuple(item["units"].shape)
    patches = cut_patches(module.shape.rules, item)
    result: torch.Tensor = module.encode((shape,), patches, item["places"], item["units"].flatten())
    return result


def picture(encoder: Any, seed: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Noise of a size, preprocessed, where the encoder is."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[0] * size[1] * 3,), dtype=torch.uint8, generator=generator)
    data = b"P6 %d %d 255\n" % size + pixels.numpy().tobytes()
    device = encoder.module.mean.device
    return {name: tensor.to(device) for name, tensor in encoder.preprocess(data).items()}


def write_weights(folder: Path) -> None:
    """transformers' random weights of the configuration in `folder`."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
