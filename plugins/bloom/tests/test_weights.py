"""BLOOM's checkpoint layout: q, k and v head by head, optional prefix, and checkpoints of the bare model."""

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig

from light_bloom.config import BloomShape
from light_sdk import ModelError
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model, save_model

CONFIG = BloomConfig(vocab_size=50, hidden_size=24, n_layer=2, n_head=3)
PLUGINS = ("light_bloom.hooks",)


def test_qkv_rows_are_put_part_by_part(tmp_path: Path) -> None:
    source = create_model(CONFIG)
    save_model(source, tmp_path, lambda config: config)
    stored = source.transformer.h[1].self_attention.query_key_value
    found = load_model(tmp_path, PLUGINS).modules["layers.1"].attention.qkv
    for head in range(3):
        for part in range(3):
            for d in range(8):
                row, saved = part * 24 + head * 8 + d, head * 24 + part * 8 + d
                assert torch.equal(found.weight[row], stored.weight[saved]) and found.bias[row] == stored.bias[saved]


def test_bare_model_has_the_embedding_for_a_head(tmp_path: Path) -> None:
    source = create_model(CONFIG)
    save_model(source.transformer, tmp_path, lambda config: config | {"architectures": ["BloomModel"]})
    prompt = [3, 1, 4, 1, 5, 9]
    driver = Driver(load_model(tmp_path, PLUGINS))
    (logits,) = driver.step([(driver.start(prompt), len(prompt))])
    with torch.inference_mode():
        torch.testing.assert_close(logits, source(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ModelError, match="25"):
        BloomShape.from_config(BloomConfig(hidden_size=25, n_head=3))
