"""Bytes and operations of a step, against sums written out by hand and against brute force."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from light_core.engine.counting import _pairs, _tokens_read, count_step, floor_ms
from light_core.ops import Choice
from light_core.types import KVGroup, KVLayout, KVPlane

PLANES = (KVPlane("k", (2, 8), "float32"), KVPlane("v", (2, 8), "float32"))
ATTENTION = Choice("attention", "any", {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": None}, "")


def module(**shapes: tuple[int, ...]) -> nn.Module:
    made = nn.Module()
    for name, shape in shapes.items():
        made.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
    return made


def runtime(
    groups: tuple[KVGroup, ...] | None = None, layers: list[nn.Module] | None = None, choices: tuple[Choice, ...] = (ATTENTION,)
) -> Any:
    layers = [module(norm=(16,), up=(48, 16), down=(16, 48))] * 3 if layers is None else layers
    layout = KVLayout(groups or (KVGroup(tuple(range(len(layers))), PLANES),))
    return SimpleNamespace(
        pre=module(table=(100, 16), norm=(16,)), layers=layers, post=module(norm=(16,), head=(100, 16)), kv_layout=layout, choices=choices
    )


def test_decode_by_hand() -> None:
    count = count_step(runtime(), query_lens=[1, 1], seq_lens=[30, 50], num_rows=2)
    assert count.embedding.num_bytes == 4 * (2 * 16 + 16) and count.embedding.num_flops == 0
    assert count.layers.num_bytes == 3 * 4 * (16 + 2 * 48 * 16) and count.layers.num_flops == 3 * 2 * 2 * (2 * 48 * 16)
    assert count.head.num_bytes == 4 * (16 + 100 * 16) and count.head.num_flops == 2 * 2 * 100 * 16
    token = 2 * 2 * 8 * 4
    assert count.attention.num_bytes == 3 * token * (30 + 50) + 3 * token * 2, "all that is read, and two tokens written"
    assert count.attention.num_flops == 3 * 4 * 4 * 8 * (30 + 50) and count.is_attention_counted
    assert count.experts.num_bytes == 0


def test_prefill_by_hand() -> None:
    count = count_step(runtime(), query_lens=[10, 5], seq_lens=[10, 25], num_rows=1)
    assert count.embedding.num_bytes == 4 * (15 * 16 + 16) and count.head.num_flops == 2 * 100 * 16
    pairs = sum(range(1, 11)) + sum(range(21, 26))
    assert count.attention.num_flops == 3 * 4 * 4 * 8 * pairs
    assert count.layers.num_flops == 3 * 2 * 15 * (2 * 48 * 16)
    many = count_step(runtime(), query_lens=[1000], seq_lens=[1000], num_rows=1)
    assert many.embedding.num_bytes == 4 * (100 * 16 + 16), "a table is read once at most"


def test_a_last_layer_that_narrows() -> None:
    """It goes on with the wanted tokens: two of 27 here, where the last request's chunk does not end its prompt."""
    made = runtime((KVGroup((0, 2), PLANES), KVGroup((1,), PLANES, window=4)))
    made.layers[2].narrows = True
    of_each, token = 2 * 48 * 16, 2 * 2 * 8 * 4
    count = count_step(made, query_lens=[1, 10, 16], seq_lens=[30, 10, 20], num_rows=2)
    assert count.layers.num_flops == 2 * (27 + 27 + 2) * of_each and count.layers.num_bytes == 3 * 4 * (16 + of_each)
    pairs = (30 + sum(range(1, 11)) + sum(range(5, 21))) + (4 + (1 + 2 + 3 + 4 * 7) + 4 * 16) + (30 + 10)
    assert count.attention.num_flops == 4 * 4 * 8 * pairs
    assert count.attention.num_bytes == token * (30 + 10 + 20 + 4 + 10 + 19 + 30 + 10) + 3 * token * 27
    none = count_step(made, [16], [16], 0)
    assert none.layers.num_flops == 2 * (16 + 16 + 1) * of_each and none.attention.num_bytes == token * 3 * 16 + 3 * token * 16
    decodes = count_step(made, [1, 1], [30, 50], 2)
    assert decodes.layers.num_flops == 3 * 2 * 2 * of_each, "decodes are all wanted"


@pytest.mark.parametrize("query_len, seq_len", [(1, 1), (1, 9), (4, 4), (3, 11), (11, 11), (7, 20), (20, 20)])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 19, 20, 40])
def test_windows(query_len: int, seq_len: int, window: int | None) -> None:
    seen = [
        [key for key in range(seq_len) if key <= position and (window is None or key > position - window)]
        for position in range(seq_len - query_len, seq_len)
    ]
    assert _pairs(query_len, seq_len, window) == sum(map(len, seen))
    assert _tokens_read(query_len, seq_len, window) == len(set().union(*seen))


def test_layers_differ() -> None:
    groups = (KVGroup((0,), PLANES), KVGroup((1,), PLANES, window=4), KVGroup((2,), ()))
    wide = dataclasses.replace(ATTENTION, facts=ATTENTION.facts | {"window": 4, "num_heads": 6})
    count = count_step(runtime(groups, choices=(ATTENTION, wide)), [1], [30], 1)
    token = 2 * 2 * 8 * 4
    assert count.attention.num_bytes == token * 30 + token * 4 + 2 * token
    assert count.attention.num_flops == 4 * 4 * 8 * 30 + 4 * 6 * 8 * 4


def test_keys_wider_than_values() -> None:
    layout = (KVGroup((0, 1, 2), (KVPlane("latent", (24,), "bfloat16"),)),)
    facts = {"num_heads": 4, "kv_width": 6 + 8 + 5}
    count = count_step(runtime(layout, choices=(Choice("any_attention", "any", facts, ""),)), [1], [30], 1)
    assert count.attention.num_bytes == 3 * 48 * 31 and count.attention.num_flops == 3 * 2 * 4 * (6 + 8 + 5) * 30
    unknown = count_step(runtime(layout, choices=()), [1], [30], 1)
    assert unknown.attention.num_flops == 0 and not unknown.is_attention_counted


def sparse(**experts: tuple[int, ...]) -> nn.Module:
    """A layer whose block sends each token through two of eight experts, beside a router, and a dense block."""
    layer, layer.block = module(other=(3, 2, 2)), module(router=(8, 16))
    layer.block.experts = module(**experts)
    layer.block.num_experts, layer.block.top_k = 8, 2
    return layer


@pytest.mark.parametrize("shape", [(8, 40, 16), (8 * 40, 16)], ids=["by expert", "below each other"])
def test_experts(shape: tuple[int, ...]) -> None:
    made = runtime((KVGroup((0,), PLANES),), [sparse(up=shape, scale=(8,))])
    count = count_step(made, [1], [3], 1)
    one_expert = 40 * 16
    assert count.experts.num_bytes == pytest.approx(4 * 2 * (one_expert + 1)), "one token reads its two experts"
    assert count.experts.num_flops == pytest.approx(2 * 2 * one_expert)
    assert count.layers.num_bytes == 4 * (8 * 16 + 3 * 2 * 2) and count.layers.num_flops == 2 * (8 * 16 + 3 * 2 * 2)
    many = count_step(made, [400], [400], 1)
    assert many.experts.num_bytes == pytest.approx(4 * 8 * (one_expert + 1))
    assert many.experts.num_flops == pytest.approx(400 * 2 * 2 * one_expert)
    # 16 tokens draw two of eight each: an expert is chosen by none with probability (3/4)^16.
    some = count_step(made, [1] * 16, [3] * 16, 16)
    assert some.experts.num_bytes == pytest.approx(4 * 8 * (one_expert + 1) * (1 - 0.75**16))


def test_layers_with_experts_differ() -> None:
    """Each module tells of its own: one whose tokens take four of sixteen, one without, one that is dense."""
    layers = [sparse(up=(8 * 40, 16)), sparse(up=(16 * 40, 16)), module(up=(48, 16))]
    layers[1].block.num_experts, layers[1].block.top_k = 16, 4
    count = count_step(runtime((KVGroup((0, 1, 2), PLANES),), layers), [1], [3], 1)
    assert count.experts.num_bytes == pytest.approx(4 * (2 + 4) * 40 * 16) and count.are_experts_known
    assert count.layers.num_bytes == 4 * (2 * (8 * 16 + 3 * 2 * 2) + 48 * 16)


@pytest.mark.parametrize("missing", ["experts", "num_experts", "top_k"])
def test_experts_that_no_module_tells_of(missing: str) -> None:
    layer = sparse(up=(8 * 40, 16))
    if missing == "experts":
        layer.block.renamed = layer.block.experts
    delattr(layer.block, missing)
    chooses = Choice("any", "any", {"num_experts": 8, "top_k": 2}, "")
    count = count_step(runtime((KVGroup((0,), PLANES),), [layer], (ATTENTION, chooses)), [1], [3], 1)
    assert count.experts.num_bytes == 0 and count.layers.num_bytes == 4 * (8 * 40 * 16 + 8 * 16 + 3 * 2 * 2)
    assert not count.are_experts_known, "an op chooses among them"
    assert count_step(runtime((KVGroup((0,), PLANES),), [layer]), [1], [3], 1).are_experts_known, "no op does"


def test_floor() -> None:
    count = count_step(runtime(), [1, 1], [30, 50], 2)
    by_bytes, by_flops = floor_ms(count, 1e6, 1e30), floor_ms(count, 1e30, 1e6)
    assert by_bytes["layers"] == pytest.approx(count.layers.num_bytes / 1e3) and by_flops["head"] == pytest.approx(
        count.head.num_flops / 1e3
    )
    both = floor_ms(count, 1e6, 1e6)
    assert both == {name: max(by_bytes[name], by_flops[name]) for name in both}
