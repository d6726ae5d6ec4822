"""Tiny random models for the tests that need two packages or more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 160
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """Word-level: token i is the word "w<i>"; 1 begins and 2 ends."""
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def tiny_llama(folder: Path, **changes: Any) -> Any:
    """Writes a random Llama and returns transformers' model of it, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def tiny_bloom(folder: Path) -> Any:
    """Writes a random BLOOM and returns transformers' model of it, float32."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(2)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, seq_length=256, initializer_range=0.3)
    config.bos_token_id, config.eos_token_id = 1, 2
    model = BloomForCausalLM(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def tiny_deepseek(folder: Path) -> Any:
    """Writes a random DeepSeek-V3 (latents, experts in groups, a bias of their choice) and returns transformers' model of it."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(3)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def tiny_mixtral(folder: Path) -> Any:
    """Writes a random Mixtral with four experts, of which a token takes two, and returns transformers' model of it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _tiny(folder, MixtralConfig, MixtralForCausalLM, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48)


def tiny_qwen_moe(folder: Path) -> Any:
    """Writes a random Qwen2-MoE (experts, a gated shared one, a layer without any) and returns transformers' model of it."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"num_experts": 6, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}
    return _tiny(folder, Qwen2MoeConfig, Qwen2MoeForCausalLM, num_experts_per_tok=2, intermediate_size=96, **experts)


def tiny_qwen(folder: Path) -> Any:
    """Writes a random Qwen3 (norms of each head, a window in one layer) and returns transformers' model of it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return _tiny(folder, Qwen3Config, Qwen3ForCausalLM, intermediate_size=96, head_dim=24, **window)


def _tiny(folder: Path, config_class: Any, model_class: Any, **settings: Any) -> Any:
    torch.manual_seed(4)
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    model = model_class(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "llama": tiny_llama,
    "bloom": tiny_bloom,
    "deepseek": tiny_deepseek,
    "mixtral": tiny_mixtral,
    "qwen": tiny_qwen,
    "qwen_moe": tiny_qwen_moe,
}


@pytest.fixture(scope="session")
def families() -> dict[str, Callable[[Path], Any]]:
    """Family to what writes a random model of it to a folder and returns transformers' model."""
    return FAMILIES


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """(folder, transformers' model) of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    return str(folder), FAMILIES[request.param](folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """(folder, transformers' model) of a random Llama."""
    folder = tmp_path_factory.mktemp("llama")
    return str(folder), tiny_llama(folder)


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama that gives NaN logits wherever token 77 is in sight."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = tiny_llama(folder)
    model.model.embed_tokens.weight.data[77] = float("nan")
    model.save_pretrained(folder)
    return str(folder)
