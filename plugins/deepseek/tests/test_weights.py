"""Checkpoints as they are published: every name of them has a place, and the layers behind the last are left out."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config

from light_core.engine.weights import check_names
from light_core.plugins import ModelRuntime, bind, load_plugins, resolve_family
from light_sdk import CheckpointError, Limits, Machine
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model, save_model

PLUGINS = ("light_deepseek.hooks",)
HOPPER, AMPERE = Machine("cuda", (9, 0), "NVIDIA H200"), Machine("cuda", (8, 0), "NVIDIA A100")
PRODUCTS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SHAPES: dict[str, dict[str, Any]] = {
    "V2-Lite": {
        "layers": 27,
        "experts": 64,
        "dense": 1,
        "hidden": 2048,
        "inner": 10944,
        "expert": 1408,
        "heads": 16,
        "q": None,
        "groups": 1,
    },
    "V2": {"layers": 60, "experts": 160, "dense": 1, "hidden": 5120, "inner": 12288, "expert": 1536, "heads": 128, "q": 1536, "groups": 8},
    "V3": {"layers": 61, "experts": 256, "dense": 3, "hidden": 7168, "inner": 18432, "expert": 2048, "heads": 128, "q": 1536, "groups": 8},
}


def published_names(name: str) -> Iterator[str]:
    """The tensors of the model's index, by its naming scheme; V3's have scales and a layer for multi-token prediction."""
    shape = SHAPES[name]
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for i in range(shape["layers"]):
        yield from (f"model.layers.{i}.{tensor}" for tensor in layer_names(name, is_dense=i < shape["dense"]))
    if name == "V3":
        yield from (f"model.layers.61.{tensor}" for tensor in layer_names(name, is_dense=False))
        for tensor in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"):
            yield f"model.layers.61.{tensor}.weight"


def layer_names(name: str, is_dense: bool) -> Iterator[str]:
    """Of one layer, without its number."""
    queries = ["q_proj"] if SHAPES[name]["q"] is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    modules = [f"self_attn.{part}" for part in (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")]
    blocks = ["mlp"] if is_dense else ["mlp.shared_experts", *(f"mlp.experts.{i}" for i in range(SHAPES[name]["experts"]))]
    modules += [f"{block}.{part}" for block in blocks for part in ("gate_proj", "up_proj", "down_proj")]
    for module in (*modules, "input_layernorm", "post_attention_layernorm"):
        yield f"{module}.weight"
        if name == "V3" and module.endswith(PRODUCTS):
            yield f"{module}.weight_scale_inv"
    if not is_dense:
        yield "mlp.gate.weight"
        if name == "V3":
            yield "mlp.gate.e_score_correction_bias"


def bind_published(name: str, machine: Machine, folder: str = "") -> ModelRuntime:
    """The model's modules on "meta"; `folder` has the checkpoint's index."""
    shape = SHAPES[name]
    kind = DeepseekV3Config if name == "V3" else DeepseekV2Config
    config = kind(
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        moe_intermediate_size=shape["expert"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        n_routed_experts=shape["experts"],
        num_experts_per_tok=6,
        first_k_dense_replace=shape["dense"],
        q_lora_rank=shape["q"],
        n_group=shape["groups"],
        topk_group=1 if shape["groups"] == 1 else 4,
        architectures=[f"Deepseek{name[:2]}ForCausalLM"],
    )
    if name == "V3":
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    loaded = load_plugins(",".join(("light_sdk.hooks", *PLUGINS)))
    return bind(
        loaded,
        family=resolve_family(config.architectures, loaded),
        config=config,
        dtype="bfloat16",
        device="meta",
        limits=Limits(4096, 8, 512),
        quantization="fp8" if name == "V3" else None,
        folder=folder,
        machine=machine,
    )


@pytest.mark.parametrize(("name", "machine"), [("V2-Lite", HOPPER), ("V2", HOPPER), ("V3", HOPPER), ("V3", AMPERE)], ids=str)
def test_published_checkpoints_fit(name: str, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = list(published_names(name))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with caplog.at_level(logging.INFO, logger="light_deepseek"):
        runtime = bind_published(name, machine, str(tmp_path))
    check_names(runtime.modules, runtime.weight_plan, names, "published")
    assert ("multi-token prediction: 1 layer" in caplog.text) == (name == "V3")


def test_no_further_layer_no_word_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers' configuration of V3 has one unless it is told otherwise."""
    names = [name for name in published_names("V3") if not name.startswith("model.layers.61.")]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with caplog.at_level(logging.INFO, logger="light_deepseek"):
        runtime = bind_published("V3", AMPERE, str(tmp_path))
    check_names(runtime.modules, runtime.weight_plan, names, "published")
    assert "multi-token prediction" not in caplog.text


def test_a_missing_expert_is_named() -> None:
    runtime = bind_published("V2-Lite", HOPPER)
    names = [name for name in published_names("V2-Lite") if not name.endswith("layers.5.mlp.experts.7.up_proj.weight")]
    with pytest.raises(CheckpointError, match=r"layers\.5\.mlp\.experts\.gate_up"):
        check_names(runtime.modules, runtime.weight_plan, names, "published")


@pytest.mark.parametrize(("name", "billions"), [("V2-Lite", 15.7), ("V2", 235.7), ("V3", 671.0)])
def test_published_sizes(name: str, billions: float) -> None:
    """Parameters as the model cards count them; block scales are not counted."""
    runtime = bind_published(name, HOPPER)
    counts = (
        parameter.numel() for module in runtime.modules.values() for key, parameter in module.named_parameters() if "scale" not in key
    )
    assert sum(counts) / 1e9 == pytest.approx(billions, abs=0.06)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    tiny = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
    heads |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    source = create_model(DeepseekV3Config(**tiny, **heads, **routing))
    save_model(source, tmp_path, lambda config: config | {"num_nextn_predict_layers": 1})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.2.mlp.gate.weight": torch.zeros(4, 32)}
    save_file(tensors | extra, file)
    prompt = [7, 3, 44, 21, 9]
    driver = Driver(load_model(tmp_path, PLUGINS))
    (logits,) = driver.step([(driver.start(prompt), len(prompt))])
    with torch.inference_mode():
        torch.testing.assert_close(logits, source(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(32, 64)}, file)
    with pytest.raises(CheckpointError, match=r"layers\.3"):
        load_model(tmp_path, PLUGINS)
