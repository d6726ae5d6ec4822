"""Whole families whose products add to the residual by themselves, as on a GPU steps of many tokens do, against transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, DeepseekV2Config, LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3Config

from light_sdk.ops.linear import onto, reference
from light_sdk.testing.conformance import Case, Run
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import MAX_MODEL_LEN, create_model, create_prompts, save_model, trace

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4}
SPARSE = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, Callable[[], Any], int]] = {
    "llama": ("light_llama.hooks", lambda: LlamaConfig(**SIZES), 4),
    "llama, biases": ("light_llama.hooks", lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), 4),
    "bloom": ("light_bloom.hooks", lambda: BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4), 4),
    "bloom, residual after the norm": (
        "light_bloom.hooks",
        lambda: BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True),
        4,
    ),
    "mixtral": ("light_mixtral.hooks", lambda: MixtralConfig(**SIZES, num_local_experts=4), 2),
    "qwen3": ("light_qwen.hooks", lambda: Qwen3Config(**SIZES, head_dim=16), 4),
    "qwen2-moe": ("light_qwen_moe.hooks", lambda: Qwen2MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[0]), 3),
    "deepseek-v2": ("light_deepseek.hooks", lambda: DeepseekV2Config(**SIZES | LATENT | SPARSE), 3),
}
"""Plugin, configuration, and the products of two layers that end in the residual: those of experts do not add."""

LEAST = 2


@pytest.mark.parametrize("name", FAMILIES)
def test_products_that_add(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, a step whose last layer goes on with the wanted tokens, and decodes, of which one alone is too few."""
    plugin, config, products = FAMILIES[name]
    added: list[int] = []

    def add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """An implementation for products with biases, too."""
        if not onto.onto(residual, x, weight):
            return False
        if bias is not None:
            residual.add_(bias)
        added.append(len(x))
        return True

    monkeypatch.setattr(onto, "LEAST_TOKENS", LEAST)
    monkeypatch.setattr(reference.linear, "onto", add, raising=False)
    source = create_model(config())
    save_model(source, tmp_path, lambda written: written)
    runtime = load_model(tmp_path, (plugin,), max_model_len=MAX_MODEL_LEN, kernels={"linear": "reference"})
    traces = [trace(source, prompt) for prompt in create_prompts(source.config.vocab_size)[:2]]
    run = Run(Case(name, tmp_path, source, traces, runtime), Driver(runtime))
    long, short = run.start(0), run.start(1)
    run.step((long, 20))
    assert added == [20] * products
    added.clear()
    run.last((long, 25), (short, 5))
    last = 1 if name in ("mixtral", "qwen2-moe", "deepseek-v2") else 2
    assert added == [30] * (products - last) + [2] * last, "the last layer goes on with two tokens"
    added.clear()
    run.step((long, 1), (short, 1))
    assert added == [2] * products
    run.decode(long, 2)
    assert added == [2] * products, "one token is left to the norm"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_products_that_add_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that has them, in bfloat16: logits are no further from float32's than where the norms add."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("`linear` has no `onto` below compute capability 9.0")
    added, product_to = [], onto.product_to
    monkeypatch.setattr(onto, "product_to", lambda out, *given, **options: added.append(len(out)) or product_to(out, *given, **options))
    near, far = (logits_error(name, tmp_path, monkeypatch, least, "cuda", {}) for least in (LEAST, MAX_MODEL_LEN))
    assert added == [45] * 4, "products that end in the residual, of one of the two"
    assert near.abs().mean() <= 1.25 * far.abs().mean()


def logits_error(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, least: int, device: str, kernels: dict[str, str]
) -> torch.Tensor:
    """What logits after a prompt's tokens in bfloat16 are off by where products add from `least` tokens on."""
    monkeypatch.setattr(onto, "LEAST_TOKENS", least)
    source = create_model(FAMILIES[name][1]())
    save_model(source, folder, lambda written: written)
    found = trace(source, create_prompts(source.config.vocab_size)[0])
    driver = Driver(load_model(folder, (FAMILIES[name][0],), "bfloat16", device, MAX_MODEL_LEN, kernels=kernels))
    (logits,) = driver.step([(driver.start(found.prompt), len(found.prompt))])
    return logits - found.logits[: len(found.prompt)]
