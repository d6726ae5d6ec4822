"""Checkpoints as they occur: three tensors an expert, or all experts of a layer in two."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

from light_sdk import CheckpointError
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model, save_model

PLUGINS = ("light_mixtral.hooks",)
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
}


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value for key, module in load_model(folder, PLUGINS).modules.items() for name, value in module.named_parameters()
    }


def test_fused_experts_are_the_same_model(tmp_path: Path) -> None:
    model = create_model(MixtralConfig(**TINY))
    save_model(model, tmp_path / "published", lambda config: config)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "sharded", save_original_format=False, max_shard_size=20_000)
    names = {kind: {name.partition(".1.")[2] for name in load_file(file)} for kind, file in files(tmp_path).items()}
    assert "block_sparse_moe.experts.2.w3.weight" in names["published"] and "mlp.experts.gate_up_proj" in names["fused"]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    expected = parameters(tmp_path / "published")
    for kind in ("fused", "sharded"):
        found = parameters(tmp_path / kind)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def files(folder: Path) -> dict[str, Path]:
    return {kind: folder / kind / "model.safetensors" for kind in ("published", "fused")}


def test_experts_lie_where_the_kernel_looks(tmp_path: Path) -> None:
    """Expert by expert: the gate (w1), the product beside it (w3); and the ways down (w2) in a parameter of their own."""
    save_model(create_model(MixtralConfig(**TINY)), tmp_path, lambda config: config)
    tensors, found = load_file(tmp_path / "model.safetensors"), parameters(tmp_path)
    gate_up, down = (found[f"layers.1.moe.experts.{name}"] for name in ("gate_up", "down"))
    for i in range(3):
        w1, w2, w3 = (tensors[f"model.layers.1.block_sparse_moe.experts.{i}.w{part}.weight"] for part in (1, 2, 3))
        assert torch.equal(gate_up.view(3, 48, 32)[i], torch.cat((w1, w3))) and torch.equal(down.view(3, 32, 24)[i], w2)


def test_missing_expert_is_named(tmp_path: Path) -> None:
    save_model(create_model(MixtralConfig(**TINY)), tmp_path, lambda config: config)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.moe\.experts\.gate_up"):
        load_model(tmp_path, PLUGINS)
