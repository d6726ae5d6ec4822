"""What the family reads out of configurations: windows, heads, and lengths that bound the prefix cache."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from light_llama.config import LlamaShape
from light_llama.kv import kv_layout
from light_sdk import ModelError


def layout(config: Any) -> Any:
    return kv_layout(SimpleNamespace(config=config, dtype="bfloat16"))  # type: ignore[arg-type]


def test_only_mistral_has_a_window() -> None:
    assert LlamaShape.from_config(MistralConfig(sliding_window=4096)).window == 4096
    assert LlamaShape.from_config(MistralConfig(sliding_window=None)).window is None
    assert LlamaShape.from_config(LlamaConfig(sliding_window=4096)).window is None


def test_kv_of_grouped_query_attention() -> None:
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=256, head_dim=64)
    (group,) = layout(config).groups
    assert group.layers == (0, 1, 2) and group.window is None
    assert [(plane.name, plane.shape, plane.dtype) for plane in group.planes] == [("k", (2, 64), "bfloat16"), ("v", (2, 64), "bfloat16")]


def test_kv_of_a_window_says_so() -> None:
    assert layout(MistralConfig(sliding_window=16)).groups[0].window == 16


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        (None, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 512}, 512),
    ],
)
def test_prefix_cache_ends_where_rotation_depends_on_length(scaling: dict[str, Any] | None, limit: int | None) -> None:
    assert layout(LlamaConfig(rope_scaling=scaling, max_position_embeddings=2048)).max_shared_len == limit


def test_unknown_scaling_is_refused_by_name() -> None:
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral"}
    with pytest.raises(ModelError, match="spiral"):
        LlamaShape.from_config(config)


def test_hooks_import_nothing_heavy() -> None:
    code = "import sys, light_llama.hooks; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
