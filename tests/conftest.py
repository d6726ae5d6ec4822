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


FAMILIES: dict[str, Callable[[Path], Any]] = {"llama": tiny_llama, "bloom": tiny_bloom}


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
