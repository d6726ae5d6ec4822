"""A wrapper has the parameters of what it wraps, under their names; media take the place of embeddings."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from light_core.engine.weights import load_weights, tie
from light_core.types import Hidden, MediaTokens, Placement, Step, WeightPlan
from light_sdk.layers import MediaPreLayer, ModuleWrapper


class Pre(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.scale = nn.Buffer(torch.tensor(2.0), persistent=False)

    def forward(self, step: Step) -> Hidden:
        step.shared["seen"] = True
        return Hidden(self.embedding(step.token_ids) * self.scale)


def step_of(ids: list[int]) -> Step:
    nothing = torch.empty(0)
    return Step(torch.tensor(ids), nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, 0, 1, 1)


def test_names_and_memory_are_those_of_the_inner_module() -> None:
    inner = Pre()
    wrapper = MediaPreLayer(MediaPreLayer(inner))
    assert [name for name, _ in wrapper.named_parameters()] == ["embedding.weight"]
    assert wrapper.get_submodule("embedding") is inner.embedding
    assert list(wrapper.state_dict()) == ["embedding.weight"], "the buffer stays out"
    wrapper.to(torch.bfloat16)
    assert inner.embedding.weight.dtype == torch.bfloat16 and inner.scale.dtype == torch.bfloat16


def test_ties_and_loading_reach_the_inner_module(tmp_path: Path) -> None:
    inner, head = Pre(), nn.Module()
    head.weight = nn.Parameter(torch.zeros(5, 3))
    modules = {"pre": MediaPreLayer(inner), "post": head}
    save_file({"e": torch.arange(15.0).view(5, 3)}, tmp_path / "model.safetensors")
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    plan = WeightPlan((Placement("e", "pre.embedding.weight"),), ties={"post.weight": "pre.embedding.weight"})
    load_weights(modules, plan, tmp_path, "cpu")
    assert torch.equal(inner.embedding.weight, torch.arange(15.0).view(5, 3)) and head.weight is inner.embedding.weight
    tie(modules, {"pre.embedding.weight": "post.weight"})
    assert inner.embedding.weight is head.weight


def test_a_wrapper_may_have_children_of_its_own() -> None:
    class Scaled(ModuleWrapper):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__(inner)
            self.more = nn.Linear(3, 3)

        def forward(self, step: Step) -> Hidden:
            return Hidden(self.more(self.inner(step).x))

    wrapper = Scaled(Pre())
    assert [name for name, _ in wrapper.named_parameters()] == ["embedding.weight", "more.weight", "more.bias"]
    assert wrapper(step_of([1])).x.shape == (1, 3)


def test_media_take_the_place_of_embeddings() -> None:
    inner = Pre()
    step, media = step_of([4, 0, 0, 2]), {"image": MediaTokens(torch.full((2, 3), 7.0, dtype=torch.float64), torch.tensor([1, 2]))}
    with torch.inference_mode():
        plain, seen = inner(step).x, MediaPreLayer(inner)(replace(step, media=media)).x
        assert torch.equal(MediaPreLayer(inner)(step).x, plain)
    assert torch.equal(seen[[0, 3]], plain[[0, 3]]) and torch.equal(seen[[1, 2]], torch.full((2, 3), 7.0))
    assert step.shared == {"seen": True}, "what the inner layer leaves for the layers is theirs"
