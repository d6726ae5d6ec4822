"""Vision layers against plain torch and transformers' CLIP."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Family, Hidden, Limits, ModelContext
from light_sdk import hooks
from light_sdk.layers import PatchEmbedding, VisionLayer
from light_sdk.ops.linear import reference as linear

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture
def model() -> ModelContext:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    table = OpTable(registry, Machine("cpu"), "float32", {"linear": "reference"})
    return ModelContext(Family("test", ("Test",)), None, "float32", "cpu", table, Limits(64, 8, 64))


def test_patches_are_a_convolution(model: ModelContext) -> None:
    patches, pixels = PatchEmbedding(model, 3, 8, channels=2), torch.randn(4, 2, 9, 6, generator=GENERATOR)
    patches.weight.data.normal_(generator=GENERATOR)
    expected = F.conv2d(pixels, patches.weight, stride=3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(pixels), expected, atol=1e-5, rtol=0)


def add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """What a product that adds to the residual by itself does."""
    residual.add_(F.linear(x, weight, bias))
    return True


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_layer_is_clips_and_pictures_do_not_mix(model: ModelContext, activation: str, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.linear, "onto", add if adds else None, raising=False)
    config = CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_attention_heads=3, hidden_act=activation)
    config._attn_implementation = "eager"
    reference = CLIPEncoderLayer(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0.0, 0.4, generator=GENERATOR)
    layer, theirs = VisionLayer(model, 24, 3, 40, activation, config.layer_norm_eps), reference.state_dict()
    names = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "attention.out": "self_attn.out_proj"}
    for part in ("weight", "bias"):
        values = {name: theirs[f"{other}.{part}"] for name, other in (names | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}).items()}
        values["attention.qkv"] = torch.cat([theirs[f"self_attn.{one}_proj.{part}"] for one in "qkv"])
        for name, value in values.items():
            layer.get_parameter(f"{name}.{part}").data.copy_(value)
    x = torch.randn(5, 7, 24, generator=GENERATOR)
    with torch.inference_mode():
        expected = reference(x, attention_mask=None)
        found = layer(Hidden(x.flatten(0, 1).clone()), 7).value().view(5, 7, 24)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        residual = torch.randn(35, 24, generator=GENERATOR)
        split = layer(Hidden(x.flatten(0, 1) - residual, residual.clone()), 7).value().view(5, 7, 24)
    torch.testing.assert_close(split, expected, atol=1e-4, rtol=0)
