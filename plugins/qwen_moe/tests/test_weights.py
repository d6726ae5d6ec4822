"""Checkpoints as they occur: three tensors an expert, or all experts of a layer in two; a shared expert beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from light_sdk import CheckpointError
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model, save_model

PLUGINS = ("light_qwen_moe.hooks",)
TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen2": Qwen2MoeConfig(
        **TINY, **EXPERTS, num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=20, mlp_only_layers=[0]
    ),
    "qwen3": Qwen3MoeConfig(**TINY, **EXPERTS, num_key_value_heads=2, moe_intermediate_size=16),
    "olmoe": OlmoeConfig(**TINY, **EXPERTS),
}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value for key, module in load_model(folder, PLUGINS).modules.items() for name, value in module.named_parameters()
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_fused_experts_are_the_same_model(config: Any, tmp_path: Path) -> None:
    model = create_model(config)
    save_model(model, tmp_path / "published", lambda config: config)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in load_file(tmp_path / "published" / "model.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    expected, found = parameters(tmp_path / "published"), parameters(tmp_path / "fused")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("missing", ["experts.1.down_proj", "shared_expert.up_proj", "shared_expert_gate", "gate"])
def test_missing_tensor_is_named(missing: str, tmp_path: Path) -> None:
    save_model(create_model(CONFIGS["qwen2"]), tmp_path, lambda config: config)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.{missing}.weight"]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.(experts\.down|shared|router)"):
        load_model(tmp_path, PLUGINS)
