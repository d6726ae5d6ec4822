"""Qwen of 2023 against a plain model in float64, written from its report (arXiv 2309.16609) and its configuration.

transformers has no such model. The one here computes attention over whole sequences with nothing shared with Light:
rotation by complex numbers, one matrix product after another, the cache a pair of tensors.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from light_qwen.config import QwenShape
from light_qwen.kv import kv_layout
from light_qwen.model import log_n
from light_sdk import ModelError
from light_sdk.testing import FamilyConformance


class QwenConfig(PretrainedConfig):
    model_type = "qwen"


LATER = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "seq_length": 32,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}
SPELLINGS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "n_positions",
}


def qwen(**changes: Any) -> QwenConfig:
    return QwenConfig(**(LATER | changes))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.ln_1, self.ln_2 = (nn.RMSNorm(size, config.layer_norm_epsilon) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(size, 3 * size), nn.Linear(size, size, bias)
        self.mlp.w1, self.mlp.w2 = nn.Linear(size, inner, bias), nn.Linear(size, inner, bias)
        self.mlp.c_proj = nn.Linear(inner, size, bias)


class Reference(PreTrainedModel):
    """Names as in the checkpoints of 2023."""

    config_class = QwenConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.transformer.ln_f = nn.RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # drawn below

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        """One sequence. `past_key_values` is (length of the prompt, keys and values of each layer)."""
        config, ids = self.config, input_ids[0]
        prompt_len, past = past_key_values or (len(ids), [None] * len(self.transformer.h))
        begin = 0 if past[0] is None else past[0][0].shape[0]
        positions = torch.arange(begin, begin + len(ids))
        x, present = self.transformer.wte(ids), []
        for block, before in zip(self.transformer.h, past):
            q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, config.num_attention_heads, config.kv_channels)).unbind(1)
            q, k = self.rotate(q, positions, prompt_len), self.rotate(k, positions, prompt_len)
            if before is not None:
                k, v = torch.cat((before[0], k)), torch.cat((before[1], v))
            present.append((k, v))
            if config.use_logn_attn:
                factors = [math.log(p + 1) / math.log(config.seq_length) if p + 1 > config.seq_length else 1.0 for p in positions.tolist()]
                q = q * torch.tensor(factors, dtype=q.dtype)[:, None, None]
            scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(config.kv_channels)
            scores.masked_fill_(positions[:, None] < torch.arange(len(k)), -math.inf)
            x = x + block.attn.c_proj(torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))
            y = block.ln_2(x)
            x = x + block.mlp.c_proj(block.mlp.w1(y) * nn.functional.silu(block.mlp.w2(y)))
        return SimpleNamespace(logits=self.lm_head(self.transformer.ln_f(x))[None], past_key_values=(prompt_len, present))

    def rotate(self, x_THD: torch.Tensor, positions: torch.Tensor, prompt_len: int) -> torch.Tensor:
        config = self.config
        dim = int(config.kv_channels * config.rotary_pct)
        alpha = 1
        if config.use_dynamic_ntk and prompt_len > config.seq_length:
            alpha = 2 ** math.ceil(math.log2(prompt_len / config.seq_length) + 1) - 1
        base = config.rotary_emb_base * alpha ** (dim / (dim - 2))
        angles = positions.double()[:, None] / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        turned = torch.complex(x_THD[..., : dim // 2].double(), x_THD[..., dim // 2 : dim].double()) * torch.exp(1j * angles)[:, None]
        return torch.cat((turned.real.to(x_THD.dtype), turned.imag.to(x_THD.dtype), x_THD[..., dim:]), dim=-1)


class TestConformance(FamilyConformance):
    plugins = ("light_qwen.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "ntk-and-log-n": qwen(),
            "first-spelling": qwen(seq_length=30),
            "half-rotary-biases": qwen(rotary_pct=0.5, no_bias=False, use_logn_attn=False),
            "neither": qwen(use_dynamic_ntk=False, use_logn_attn=False, seq_length=8),
            "log-n-alone": qwen(use_dynamic_ntk=False, seq_length=8),
        }

    def create_source(self, name: str) -> Any:
        """Weights that float32 holds exactly, computed with in float64."""
        model, generator = Reference(self.configs()[name]).float().eval(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.normal_(0.0, 0.25, generator=generator)
                if parameter.ndim == 1 and parameter_name.endswith("weight"):
                    parameter.add_(1.0)
        return model.double()

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as Qwen's own repositories have it, in August 2023 and later."""
        config = {key: value for key, value in config.items() if key in LATER} | {"architectures": LATER["architectures"]}
        return {SPELLINGS.get(key, key): value for key, value in config.items()} if name == "first-spelling" else config


@pytest.mark.parametrize(("ntk", "shared"), [(True, 32), (False, None)])
def test_prefix_cache_ends_where_the_base_depends_on_the_prompt(ntk: bool, shared: int | None) -> None:
    layout = kv_layout(SimpleNamespace(config=qwen(use_dynamic_ntk=ntk), dtype="bfloat16"))  # type: ignore[arg-type]
    assert layout.max_shared_len == shared


def test_log_n_starts_after_the_training_length() -> None:
    factors = log_n(torch.arange(64), 32)
    assert torch.equal(factors[:32], torch.ones(32))
    assert factors[63].item() == pytest.approx(math.log(64) / math.log(32), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kv_channels": 8}, "4 heads of 8"), ({"intermediate_size": 161}, "161"), ({"seq_length": None}, "seq_length")],
)
def test_configurations_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        QwenShape.from_config(qwen(**change))
