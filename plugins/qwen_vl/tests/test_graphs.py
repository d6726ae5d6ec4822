"""Shapes that come back are captured once and replayed with what is in the pictures now; all others run as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from light_qwen_vl.images import cut_patches
from light_qwen_vl.model import batches
from light_sdk.graphs import SEEN
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


def test_small_pictures_are_encoded_together_and_large_ones_with_their_equals() -> None:
    assert batches([(2, 3), (9, 9), (1, 4), (2, 3), (8, 8)], 64, 128) == [[2, 0, 3], [4], [1]]
    assert batches([(8, 8), (9, 9), (8, 8), (8, 8)], 64, 128) == [[0, 2], [3], [1]]
    assert batches([(20, 20), (20, 20)], 64, 128) == [[0], [1]]
    assert batches([(8, 8)], 64, 128) == [[0]] and batches([(1, 1)], 64, 128) == [[0]]


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_do_not_see_each_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever batches they are encoded, in their order."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    write_weights(tmp_path)
    (encoder,) = load_model(tmp_path, ("light_qwen.hooks", "light_qwen_vl.hooks")).media_encoders
    items = [picture(encoder, seed, size) for seed, size in enumerate(((200, 130), (90, 310), (60, 60), (200, 130)))]
    with torch.inference_mode():
        expected = torch.cat([encoder.module([item]) for item in items])
        for large, together in ((10_000, 10_000), (100, 500), (1, 1)):
            monkeypatch.setattr("light_qwen_vl.model.LARGE", large)
            monkeypatch.setattr("light_qwen_vl.model.TOGETHER", together)
            torch.testing.assert_close(encoder.module(items), expected, atol=1e-5, rtol=0)


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
