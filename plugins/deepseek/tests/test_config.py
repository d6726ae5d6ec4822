"""What the family reads out of configurations: the published ones, and where transformers reads them differently."""

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

from light_deepseek.config import DeepseekShape
from light_deepseek.kv import kv_layout
from light_sdk import ModelError
from light_sdk.layers.experts import Routing

YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}


def v2_lite() -> Any:
    """config.json of deepseek-ai/DeepSeek-V2-Lite, as far as it is read."""
    return DeepseekV2Config.from_dict(
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": dict(YARN),
        }
    )


def v2() -> Any:
    """config.json of deepseek-ai/DeepSeek-V2."""
    return DeepseekV2Config.from_dict(
        v2_lite().to_dict()
        | {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 160,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "q_lora_rank": 1536,
        }
    )


def v3() -> Any:
    """config.json of deepseek-ai/DeepSeek-V3 and R1."""
    return DeepseekV3Config.from_dict(
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "moe_layer_freq": 1,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
        }
    )


PUBLISHED = {"V2-Lite": v2_lite, "V2": v2, "V3": v3}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_token_keeps_1152_bytes_a_layer(name) -> None:
    config = PUBLISHED[name]()
    (group,) = kv_layout(SimpleNamespace(config=config, dtype="bfloat16")).groups  # type: ignore[arg-type]
    (plane,) = group.planes
    assert (plane.shape, plane.dtype) == ((576,), "bfloat16") and math.prod(plane.shape) * 2 == 1152
    assert group.layers == tuple(range(config.num_hidden_layers)) and group.window is None


V3_ROUTING = Routing(256, 8, "sigmoid", True, 2.5, 8, 4, "top2_sum", True)


def routing(config: Any) -> Routing | None:
    return DeepseekShape.from_config(config).routing


def test_routing_of_the_published_models() -> None:
    assert routing(v2_lite()) == Routing(64, 6, "softmax", False, 1.0)
    assert routing(v2()) == Routing(160, 6, "softmax", False, 16.0, 8, 3, "max")
    assert routing(v3()) == V3_ROUTING


def test_routing_without_the_entries_that_transformers_leaves_out() -> None:
    assert routing(DeepseekV3Config()) == V3_ROUTING
    assert routing(DeepseekV2Config(num_experts_per_tok=6)) == Routing(64, 6, "softmax", False, 1.0)


def test_v2_normalises_weights_or_scales_them() -> None:
    """Its own code does one or the other; transformers leaves `norm_topk_prob` out. V3 does both."""
    found = routing(DeepseekV2Config(num_experts_per_tok=6, norm_topk_prob=True, routed_scaling_factor=16.0))
    assert found == Routing(64, 6, "softmax", True, 1.0)


def test_layers_with_experts() -> None:
    assert DeepseekShape.from_config(v2_lite()).moe_layers == frozenset(range(1, 27))
    assert DeepseekShape.from_config(v3()).moe_layers == frozenset(range(3, 61))
    config = v2_lite()
    config.moe_layer_freq = 2
    assert DeepseekShape.from_config(config).moe_layers == frozenset(range(2, 27, 2))
    config.n_routed_experts = 0
    shape = DeepseekShape.from_config(config)
    assert not shape.moe_layers and shape.routing is None and not shape.num_shared_experts


def test_score_scale() -> None:
    """1 / sqrt(192) times the square of 0.1 * mscale_all_dim * ln(factor) + 1."""
    assert DeepseekShape.from_config(v2_lite()).score_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    assert DeepseekShape.from_config(v3()).score_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert DeepseekShape.from_config(DeepseekV3Config()).score_scale == 192**-0.5


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
        ({"mscale": 0.707, "mscale_all_dim": 0.0}, 0.0707 * math.log(40) + 1),
        ({"mscale": None, "mscale_all_dim": None, "attention_factor": 0.9}, 0.9),
    ],
    ids=["equal", "both", "mscale alone", "given"],
)
def test_rotary_factor_is_that_of_the_models_own_code(changes: dict[str, Any], factor: float) -> None:
    config = v2_lite()
    config.rope_parameters = dict(config.rope_parameters) | changes
    assert DeepseekShape.from_config(config).rope.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk_method": "dartboard"}, "dartboard"),
        ({"scoring_func": "tanh"}, "tanh"),
        ({"n_group": 7, "topk_method": "group_limited_greedy"}, "7 groups"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    config = v2_lite()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=words):
        DeepseekShape.from_config(config)


def test_hooks_import_nothing_heavy() -> None:
    code = "import sys, light_deepseek.hooks; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
