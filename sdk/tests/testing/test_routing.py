"""Routers whose choices do not hang on rounding."""

import copy

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from light_sdk.testing.reference import create_model, create_prompts
from light_sdk.testing.routing import settle_routing

TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def choices(model: object, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Experts of all tokens, layer by layer."""
    found: list[torch.Tensor] = []
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(lambda module, given, out: found.append(out[2].sort(-1).values)) for router in routers]
    with torch.inference_mode():
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    assert len(found) == len(routers) * len(prompts)
    return found


def test_bfloat16_chooses_as_float32_does() -> None:
    prompts = create_prompts(50)
    model = create_model(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=5))
    assert settle_routing(model, prompts) is model
    rounded = copy.deepcopy(model).bfloat16()
    assert all(map(torch.equal, choices(model, prompts), choices(rounded, prompts)))
    used = torch.cat(choices(model, prompts)).unique().tolist()
    assert len(used) > 2, "tokens still go different ways"
    again = settle_routing(create_model(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=5)), prompts)
    assert all(map(torch.equal, model.parameters(), again.parameters())), "the same seed gives the same routers"


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="no router"):
        settle_routing(create_model(LlamaConfig(**TINY)), [[1, 2]])
