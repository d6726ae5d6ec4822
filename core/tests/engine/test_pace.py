"""How large the steps with prompts of a paced batch are, for shapes of published models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from light_core.engine.pace import MOST, ROUND, pace_of
from light_core.types import KVGroup, KVLayout


def model(num_layers: int, dense: tuple[int, int], experts: tuple[int, int] = (0, 0), num_experts: int = 1, top_k: int = 1) -> Any:
    """Layers with one matrix of shape `dense`, and one of the experts'."""
    layer, options = nn.Module(), {"dtype": torch.bfloat16, "device": "meta"}
    layer.register_parameter("weight", nn.Parameter(torch.empty(dense, **options), requires_grad=False))
    if experts[0]:
        layer.experts, layer.num_experts, layer.top_k = nn.Linear(experts[1], experts[0], bias=False, **options), num_experts, top_k
    layout = KVLayout((KVGroup(tuple(range(num_layers)), ()),))
    return SimpleNamespace(pre=nn.Module(), layers=[layer] * num_layers, post=nn.Module(), kv_layout=layout, choices=())


@pytest.mark.parametrize(
    ("runtime", "pace"),
    [
        (model(32, (218_103_808 // 4096, 4096)), ROUND),  # Llama-3 8B
        (model(80, (855_638_016 // 8192, 8192)), ROUND),  # Llama-3 70B
        (model(16, (60_817_408 // 2048, 2048)), 3 * ROUND),  # Llama-3.2 1B
        (model(32, (41_943_040 // 4096, 4096), (8 * 3 * 14336, 4096), 8, 2), ROUND),  # Mixtral 8x7B
        (model(27, (13_800_000 // 2048 + 3 * 2816, 2048), (64 * 3 * 1408, 2048), 64, 6), 3 * ROUND),  # DeepSeek-V2-Lite
        (model(4, (64, 64)), MOST),
        (model(4, (0, 64)), MOST),
    ],
    ids=["8b", "70b", "1b", "mixtral", "deepseek-v2-lite", "tiny", "none"],
)
def test_the_gpu_is_busy_while_the_host_launches(runtime: Any, pace: int) -> None:
    assert pace_of(runtime) == pace
    assert pace_of(runtime, replayed=True) == (ROUND if pace < MOST else MOST), "a replay costs the host a third"


@pytest.mark.parametrize(
    ("runtime", "pace"),
    [
        (model(32, (218_103_808 // 4096, 4096)), ROUND),  # Llama-3 8B
        (model(80, (855_638_016 // 8192, 8192)), ROUND),  # Llama-3 70B
        (model(32, (41_943_040 // 4096, 4096), (8 * 3 * 14336, 4096), 8, 2), ROUND),  # Mixtral 8x7B
        (model(27, (13_800_000 // 2048 + 3 * 2816, 2048), (64 * 3 * 1408, 2048), 64, 6), 2 * ROUND),  # DeepSeek-V2-Lite
        (model(48, (18_874_368 // 2048, 2048), (128 * 3 * 768, 2048), 128, 8), 3 * ROUND),  # Qwen3-30B-A3B
        (model(4, (0, 64)), MOST),
    ],
    ids=["8b", "70b", "mixtral", "deepseek-v2-lite", "qwen3-30b-a3b", "none"],
)
def test_a_served_step_takes_longer_than_reading_all_experts(runtime: Any, pace: int) -> None:
    assert pace_of(runtime, replayed=True, served=True) == pace
