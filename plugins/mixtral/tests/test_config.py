"""What the family reads out of configurations: the window, heads, experts."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MixtralConfig

from light_mixtral.config import MixtralShape
from light_mixtral.kv import kv_layout
from light_sdk import ModelError


def layout(config: Any) -> Any:
    return kv_layout(SimpleNamespace(config=config, dtype="bfloat16"))  # type: ignore[arg-type]


def test_published_sizes() -> None:
    """transformers' defaults are those of 8x7B; 8x22B by its model card's config.json."""
    small = MixtralShape.from_config(MixtralConfig())
    assert (small.num_layers, small.hidden_size, small.intermediate_size, small.head_dim) == (32, 4096, 14336, 128)
    large = MixtralShape.from_config(
        MixtralConfig(
            hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48, max_position_embeddings=65536
        )
    )
    assert (large.num_layers, large.hidden_size, large.intermediate_size, large.head_dim) == (56, 6144, 16384, 128)
    for shape in (small, large):
        assert (shape.routing.num_experts, shape.routing.top_k, shape.routing.renormalize) == (8, 2, True)
        assert shape.num_kv_heads == 8 and shape.window is None and shape.rope.theta == 1e6


def test_kv_bytes_of_a_token() -> None:
    (group,) = layout(MixtralConfig()).groups
    assert group.layers == tuple(range(32)) and group.window is None
    assert sum(plane.shape[0] * plane.shape[1] * 2 for plane in group.planes) * 32 == 128 * 1024


def test_window_is_told_to_core() -> None:
    assert layout(MixtralConfig(sliding_window=16)).groups[0].window == 16


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match="9 experts of a token"):
        MixtralShape.from_config(MixtralConfig(num_experts_per_tok=9))


def test_hooks_import_nothing_heavy() -> None:
    code = "import sys, light_mixtral.hooks; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
