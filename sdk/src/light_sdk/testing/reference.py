"""Tiny random models of transformers, and what they compute: the reference that families are held to.

Weights are drawn wide (standard deviation 0.25, norms around 1, biases too), so that a wrong constant, a swapped
tensor or a missing bias moves logits by far more than rounding does.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__all__ = ["MAX_MODEL_LEN", "NUM_OUTPUT", "PREFIX_LEN", "Trace", "create_model", "create_prompts", "save_model", "trace"]

MAX_MODEL_LEN = 64
NUM_OUTPUT = 10
PREFIX_LEN = 20
_LENS = (45, 5, 27)
_STD = 0.25


@dataclass(frozen=True, eq=False)
class Trace:
    """One sequence as transformers computes it: the prompt in one pass, then one token at a time, greedily.

    Attributes:
        prompt: token ids.
        output: the `NUM_OUTPUT` likeliest tokens.
        logits: float32 `[len(prompt) + NUM_OUTPUT - 1, V]`, after each token that was read.
    """

    prompt: list[int]
    output: list[int]
    logits: torch.Tensor

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.prompt + self.output


def create_model(config: Any, seed: int = 0, factory: Any = AutoModelForCausalLM) -> Any:
    """transformers' model of `config` on the CPU, in float32, with eager attention and wide random weights; `factory` is the
    auto class that knows it."""
    model = factory.from_config(copy.deepcopy(config), attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, _STD, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def create_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Four prompts of 45, 5, 27 and 29 tokens; the last begins with the first `PREFIX_LEN` tokens of the third."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    prompts = [draw(count) for count in _LENS]
    return [*prompts, prompts[2][:PREFIX_LEN] + draw(9)]


def trace(model: Any, prompt: list[int], **media: torch.Tensor) -> Trace:
    """What `model` makes of `prompt`, and of what `media` gives it with the prompt, such as pixel values.

    On a copy: some rotary scalings remember the longest sequence they have seen.
    """
    model, logits, output = copy.deepcopy(model), [], []
    tokens, past = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(NUM_OUTPUT):
            out = model(input_ids=tokens, past_key_values=past, use_cache=True, **media)
            logits.append(out.logits[0].float())
            past, tokens, media = out.past_key_values, out.logits[:, -1:].argmax(-1), {}
            output.append(int(tokens))
    return Trace(prompt, output, torch.cat(logits))


def save_model(model: Any, folder: Path, rewrite: Callable[[dict[str, Any]], dict[str, Any]], max_shard_size: int | str = "5GB") -> None:
    """Writes config.json, passed through `rewrite`, and safetensors of at most `max_shard_size` (bytes, or "5GB") each."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    path = folder / "config.json"
    path.write_text(json.dumps(rewrite(json.loads(path.read_text()))))
