"""The weight-plan builder and its transforms."""

import torch

from light_core.types import Placement
from light_sdk.weights import WeightPlanBuilder, deinterleave, transpose


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
