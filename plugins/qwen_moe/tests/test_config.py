"""What the family reads out of configurations: experts and the layers that have them, biases, windows."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from light_qwen_moe.config import QwenMoeShape
from light_qwen_moe.kv import kv_layout
from light_sdk import ModelError


def layout(config: Any) -> Any:
    return kv_layout(SimpleNamespace(config=config, dtype="bfloat16"))  # type: ignore[arg-type]


def test_published_sizes() -> None:
    """Qwen1.5-MoE-A2.7B and OLMoE-1B-7B are transformers' defaults; Qwen3-30B-A3B by its config.json."""
    qwen2 = QwenMoeShape.from_config(Qwen2MoeConfig())
    assert (qwen2.routing.num_experts, qwen2.routing.top_k, qwen2.routing.renormalize) == (60, 4, False)
    assert (qwen2.expert_size, qwen2.shared_size, qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (1408, 5632, True, False, None)
    settings = {"num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": True, "rope_theta": 1000000.0}
    qwen3 = QwenMoeShape.from_config(Qwen3MoeConfig(**settings))
    assert (qwen3.routing.num_experts, qwen3.routing.top_k, qwen3.routing.renormalize) == (128, 8, True)
    assert (qwen3.expert_size, qwen3.shared_size, qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (768, 0, False, "head", 128)
    olmoe = QwenMoeShape.from_config(OlmoeConfig())
    assert (olmoe.routing.num_experts, olmoe.routing.top_k, olmoe.routing.renormalize) == (64, 8, False)
    assert (olmoe.expert_size, olmoe.num_kv_heads, olmoe.qk_norm, olmoe.clip_qkv) == (2048, 16, "all", None)
    assert all(all(shape.moe_layers) and set(shape.windows) == {None} for shape in (qwen2, qwen3, olmoe))


def test_layers_without_experts() -> None:
    shape = QwenMoeShape.from_config(Qwen3MoeConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert shape.moe_layers == (False, True, False, False, False, True)


def test_groups_of_windows() -> None:
    config = Qwen2MoeConfig(num_hidden_layers=4, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    windows = QwenMoeShape.from_config(config).windows
    assert set(windows) == {16, None}
    assert {group.window: group.layers for group in layout(config).groups} == {
        window: tuple(i for i in range(4) if windows[i] == window) for window in (16, None)
    }
    assert [group.window for group in layout(Qwen3MoeConfig(use_sliding_window=True, sliding_window=16)).groups] == [16]
    assert [group.window for group in layout(Qwen3MoeConfig(sliding_window=16)).groups] == [None]


def test_unknown_kinds_of_layers_are_refused() -> None:
    config = Qwen2MoeConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "spiral"]
    with pytest.raises(ModelError, match="spiral"):
        QwenMoeShape.from_config(config)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match="8 experts of a token"):
        QwenMoeShape.from_config(Qwen3MoeConfig(num_experts=4))


def test_hooks_import_nothing_heavy() -> None:
    code = "import sys, light_qwen_moe.hooks; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
