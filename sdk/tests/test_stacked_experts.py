"""Plans for stacked experts in both layouts of checkpoints, and what tells the layouts apart."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from light_core.engine.weights import load_weights
from light_sdk.weights import WeightPlanBuilder, stored_names

EXPERTS, HIDDEN, INNER = 3, 4, 2


def block() -> nn.Module:
    module = nn.Module()
    module.experts = nn.Module()
    module.experts.gate_up = nn.Parameter(torch.full((EXPERTS * 2 * INNER, HIDDEN), float("nan")), requires_grad=False)
    module.experts.down = nn.Parameter(torch.full((EXPERTS * HIDDEN, INNER), float("nan")), requires_grad=False)
    return module


def load(folder: Path, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    plan = WeightPlanBuilder("model.")
    plan.experts("layers.0.moe", "layers.0.experts", (EXPERTS, HIDDEN, INNER), ("w1", "w3", "w2"), fused)
    module = block()
    load_weights({"layers.0": module}, plan.build(), folder, "cpu")
    return module.experts.gate_up.view(EXPERTS, 2, INNER, HIDDEN), module.experts.down.view(EXPERTS, HIDDEN, INNER)


def test_both_layouts_fill_the_same_places(tmp_path: Path) -> None:
    gate, up = torch.randn(2, EXPERTS, INNER, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, INNER)
    parts = {"w1": gate, "w2": down, "w3": up}
    single = {f"model.layers.0.moe.{i}.{name}.weight": part[i].clone() for name, part in parts.items() for i in range(EXPERTS)}
    fused = {"layers.0.moe.gate_up_proj": torch.cat((gate, up), 1), "layers.0.moe.down_proj": down}
    for kind, tensors in (("single", single), ("fused", fused)):
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors")
        found_gate_up, found_down = load(tmp_path / kind, kind == "fused")
        assert torch.equal(found_gate_up[:, 0], gate) and torch.equal(found_gate_up[:, 1], up) and torch.equal(found_down, down)


def test_stored_names(tmp_path: Path) -> None:
    assert stored_names(tmp_path) == stored_names(tmp_path / "nowhere") == frozenset()
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors", {"format": "pt"})
    save_file({"b.c": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert stored_names(tmp_path) == {"a", "b.c"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"d": "three.safetensors"}}))
    assert stored_names(str(tmp_path)) == {"d"}
    for broken in ("{", "[]", '{"weight_map": null}'):
        index.write_text(broken)
        assert stored_names(tmp_path) == frozenset(), "what is wrong with a file is for loading to say"


def test_stored_names_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    for content in (b"", b"version https://git-lfs", (2**60).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"nope"):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert stored_names(tmp_path) <= frozenset()
