"""Numbers of squares that come back are replayed by CUDA graphs, and give what the tower gives without."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from light_llava.model import BATCH, GRAPH_BATCH, create_encoder
from light_sdk.graphs import MAX_GRAPHS, SEEN, ShapeGraphs
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model

PLUGINS = ("light_llama.hooks", "light_llava.hooks")
SIDE, TOKENS = 28, 4
TEXT = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "image_size": SIDE,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-1.5."""
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=100)
    folder = tmp_path_factory.mktemp("llava")
    create_model(config, factory=AutoModelForImageTextToText).save_pretrained(folder)
    return folder


def squares(count: int, seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """An item of noise."""
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {"tiles": pixels.to(device)}


class Recorder:
    """In the place of `ShapeGraphs`: runs every batch as it is, and keeps the shapes."""

    def __init__(self, encode: Callable[..., torch.Tensor]) -> None:
        self.encode, self.shapes = encode, []

    def __call__(self, shape: int, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.shapes.append(shape)
        return self.encode(shape, *inputs)


def test_a_batch_is_known_by_its_number_of_squares(folder: Path) -> None:
    """Those of all pictures together, as many at a time as activations are bounded to; pictures do not see each other."""
    module: Any = load_model(folder, PLUGINS).media_encoders[0].module
    items = [squares(count, seed) for seed, count in enumerate((1, 5, 30, 3))]
    with torch.inference_mode():
        expected = torch.cat([module([item]) for item in items])
        module.graphs = Recorder(module.encode)
        found = module(items)
    assert module.graphs.shapes == [BATCH, 39 - BATCH] and len(found) == 39 * TOKENS
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), "float32 products of more rows are added up in another order"


def test_every_number_that_is_captured_has_room() -> None:
    assert min(MAX_GRAPHS, BATCH) >= GRAPH_BATCH


@pytest.mark.parametrize("eager", [False, True])
def test_nothing_is_captured_where_that_is_switched_off(folder: Path, eager: bool) -> None:
    model = replace(load_model(folder, PLUGINS).model, enforce_eager=eager)
    assert create_encoder(model).module.graphs._captures is not eager


def test_without_a_gpu_nothing_is_captured(folder: Path) -> None:
    module: Any = load_model(folder, PLUGINS).media_encoders[0].module
    for _ in range(SEEN + 2):
        module([squares(1)])
    assert module.graphs.shapes == ()


class FakeTensor(torch.Tensor):
    """One that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class FakeGraph:
    """In the place of CUDA's: replaying it encodes what is in its inputs now."""

    owner: ShapeGraphs

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        pass

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        ((count, captured),) = ((count, one) for count, one in self.owner._graphs.items() if one.graph is self)
        captured.output.copy_(self.owner._encode(count, *captured.inputs))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def test_each_number_is_captured_in_the_memory_of_the_largest(folder: Path, gpu: None) -> None:
    module: Any = load_model(folder, PLUGINS).media_encoders[0].module
    FakeGraph.owner = module.graphs
    with torch.inference_mode():
        for seed in range(SEEN + 2):
            for count in (1, 5, GRAPH_BATCH + 1):
                item = squares(count, seed)
                expected = module([item])
                found = module([{"tiles": item["tiles"].as_subclass(FakeTensor)}])
                torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, atol=1e-5, rtol=0)
    assert module.graphs.shapes == (GRAPH_BATCH, 1, 5)
    (memory,) = {captured.inputs[0].data_ptr() for captured in module.graphs._graphs.values()}
    assert memory == module.graphs._memory.inputs[0].data_ptr()


@pytest.mark.gpu
def test_embeddings_by_a_graph_are_those_without(folder: Path) -> None:
    """Different pictures, one and five squares at a time, in float32 and in bfloat16."""
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.05)):
        module: Any = load_model(folder, PLUGINS, dtype, "cuda").media_encoders[0].module
        for seed in range(2 * SEEN):
            for count in (1, 5):
                item = squares(count, seed, "cuda")
                with torch.inference_mode():
                    expected = module.encode(count, item["tiles"]).flatten(0, 1)
                    found = module([item])
                error = (found - expected).float().abs().max() / expected.float().abs().max()
                assert error <= bound, f"{dtype}, {count} squares: off by {error:.3g} of the largest"
        assert module.graphs.shapes == (GRAPH_BATCH, 1, 5)
