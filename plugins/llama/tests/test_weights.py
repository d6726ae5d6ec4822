"""Checkpoints as they occur: without the prefix, with saved rotary frequencies, with a head that is tied anyway."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from light_sdk import CheckpointError
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model, save_model

PLUGINS = ("light_llama.hooks",)
TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(create_model(LlamaConfig(**TINY, tie_word_embeddings=request.param)), tmp_path, lambda config: config)
    return tmp_path


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value for key, module in load_model(folder, PLUGINS).modules.items() for name, value in module.named_parameters()
    }


def test_names_without_prefix_and_saved_frequencies(folder: Path) -> None:
    expected, tensors = parameters(folder), load_file(folder / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    rewrite(folder, stripped | {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    found = parameters(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_saved_head_gives_way_to_the_embedding_where_tied(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, tensors | {"lm_head.weight": torch.zeros(50, 32)})
    runtime, tied = load_model(folder, PLUGINS), json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    head, embedding = runtime.modules["post"].head.weight, runtime.modules["pre"].embedding.weight
    assert (head is embedding) == tied
    assert bool(head.any()) == tied


def test_missing_projection_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.qkv\.weight"):
        load_model(folder, PLUGINS)


def test_yi_of_its_own_architecture(tmp_path: Path) -> None:
    """Its norms are called ln1 and ln2, and transformers has no class for its configuration."""
    source = create_model(LlamaConfig(**TINY, num_key_value_heads=2, rope_theta=5000000.0, pad_token_id=0))
    settings = {"architectures": ["YiForCausalLM"], "model_type": "Yi", "rope_theta": 5000000.0}
    dropped = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")
    save_model(source, tmp_path, lambda config: {name: value for name, value in config.items() if name not in dropped} | settings)
    norms = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    tensors = load_file(tmp_path / "model.safetensors")
    for old, new in norms.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    rewrite(tmp_path, tensors)
    prompt = [7, 3, 44, 21, 9]
    driver = Driver(load_model(tmp_path, PLUGINS))
    (logits,) = driver.step([(driver.start(prompt), len(prompt))])
    with torch.inference_mode():
        torch.testing.assert_close(logits, source(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)
