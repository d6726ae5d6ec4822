"""The weight-plan builder and its transforms."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from light_core.engine.weights import load_weights
from light_core.types import Placement, WeightPlan
from light_sdk.weights import WeightPlanBuilder, deinterleave, join_plans, nest_plan, transpose


def test_merge_stacks_rows() -> None:
    builder = WeightPlanBuilder("model.")
    builder.merge("layers.0.qkv.weight", [("q", 8), ("k", 2), ("v", 2)])
    plan = builder.build()
    assert [(p.source, p.offset, p.rows) for p in plan.placements] == [("q", 0, 8), ("k", 8, 2), ("v", 10, 2)]
    assert plan.prefixes == ("model.",)


def test_linear_adds_the_bias_where_there_is_one() -> None:
    builder = WeightPlanBuilder()
    builder.linear("a", "post.a")
    builder.linear("b", "post.b", bias=True)
    builder.merged_linear("post.c", iter([("x", 1), ("y", 2)]), bias=True)
    assert [(p.source, p.param, p.offset) for p in builder.build().placements] == [
        ("a.weight", "post.a.weight", 0),
        ("b.weight", "post.b.weight", 0),
        ("b.bias", "post.b.bias", 0),
        ("x.weight", "post.c.weight", 0),
        ("y.weight", "post.c.weight", 1),
        ("x.bias", "post.c.bias", 0),
        ("y.bias", "post.c.bias", 1),
    ]


def test_copies_ties_and_exceptions() -> None:
    builder = WeightPlanBuilder()
    builder.copy("norm.weight", "post.norm.weight", transform=transpose, optional=True)
    builder.tie("post.head.weight", "pre.embedding.weight")
    builder.ignore(r".*\.inv_freq", r"masked_bias")
    plan = builder.build()
    assert plan.placements == (Placement("norm.weight", "post.norm.weight", transform=transpose, optional=True),)
    assert plan.ties == {"post.head.weight": "pre.embedding.weight"} and plan.ignored == (r".*\.inv_freq", r"masked_bias")


def test_plan_does_not_change_with_its_builder() -> None:
    builder = WeightPlanBuilder()
    plan = builder.build()
    builder.tie("a", "b")
    builder.copy("c", "d")
    assert not plan.ties and not plan.placements


def test_deinterleave_puts_heads_of_a_part_together() -> None:
    """Rows are named head, part, dimension."""
    names = torch.tensor([[100 * head + 10 * part + d for d in range(4)] for head in range(2) for part in range(3)]).flatten()
    expected = [100 * head + 10 * part + d for part in range(3) for head in range(2) for d in range(4)]
    transform = deinterleave(num_heads=2, parts=3)
    assert transform(names).tolist() == expected
    assert transform(names[:, None] * torch.ones(1, 5))[:, 3].tolist() == expected


def test_transforms_keep_no_view_of_their_argument() -> None:
    for transform in (transpose, deinterleave(2, 3)):
        tensor = torch.arange(36.0).view(6, 6)
        done = transform(tensor)
        assert done.is_contiguous() and done.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


NESTINGS = (
    ("", ""),
    ("model.", ""),
    ("language_model.", "language_model."),
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
)


def test_a_text_models_plan_within_a_checkpoint_of_more(tmp_path: Path) -> None:
    builder = WeightPlanBuilder("model.")
    builder.copy("norm.weight", "post.norm.weight")
    builder.copy("lm_head.weight", "post.head.weight")
    builder.ignore(r"drop\d")
    plan = nest_plan(builder.build(), "model.language_model.", "language_model.")
    for before, head in NESTINGS:
        post = nn.Module()
        post.norm, post.head = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        names = (f"{before}norm.weight", f"{head}lm_head.weight", f"{before}drop1")
        save_file({name: torch.full((1, 2), 3.0) for name in names}, tmp_path / "model.safetensors")
        load_weights({"post": post.requires_grad_(False)}, plan, tmp_path, "cpu")
        assert post.norm.weight.tolist() == post.head.weight.tolist() == [[3.0, 3.0]], before


def test_joined_plans_say_what_each_says() -> None:
    first = WeightPlan((Placement("a", "pre.a"),), {"post.x": "pre.a"}, ("i",), ("p.",), ("f",))
    second = WeightPlan((Placement("b", "media.image.b"),), {}, ("i", "j"), ("q.", "p."), ("g",))
    both = join_plans(first, second)
    assert [placement.source for placement in both.placements] == ["a", "b"] and both.ties == {"post.x": "pre.a"}
    assert (both.ignored, both.prefixes, both.folders) == (("i", "j"), ("p.", "q."), ("f", "g"))
