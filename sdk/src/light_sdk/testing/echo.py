"""A model family without weights whose output a test can predict: `--model-plugin light_sdk.testing.echo`.

It keeps each token's id in a KV plane and reads nothing but that plane to choose the next token, so that a server or
engine test goes through the real scheduler, KV pool, prefix cache and preemption, and a slot that holds another
request's token, or none, shows in the output. The rule, with tokens t_0 … t_(n-1) so far:

    "repeat"    next = t_(n - P) if n >= P, else t_0. P is `echo_period` of config.json, or, where that is null,
                1 + t_0 mod 8. With P the length of the prompt, the output is the prompt again and again.
    "checksum"  next = F + (sum over i of (i + 1) * (t_i + 1)) mod (V - F), with F = `echo_first`, the first id that is
                no special token: every slot of the past counts.

Both depend on the tokens and their order alone, so chunking, caching, preemption and batching change nothing.
`predict` computes the same in plain Python. Logits are 50 for the next token and 0 for every other, so that sampling
takes it too and penalties or biases still act. `step_delay_ms` of config.json makes every step take that long on a CPU.

With `echo_media` "flat" or "grid" it sees pictures too, at the token "<image>". A picture takes a token for every 16 by 16
pixels (or a part of that), and counts as a token `picture_values` says for each, which depends on every pixel; so a picture
that is not there, or another one, shows in the output. "grid" also gives it positions of three axes, as some families have,
and adds p_0 + 2 p_1 + 3 p_2 to each token before the rule. A magenta first pixel makes the encoder fail, a green one the
preprocessing.

This module is a plugin's `hooks.py`: it imports no torch; the layers are in `echo_model.py`.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from light_core.errors import ModelError
from light_core.hookspecs import hookimpl
from light_core.types import (
    Family,
    FamilyRegistry,
    KVGroup,
    KVLayout,
    KVPlane,
    Layer,
    MediaEncoder,
    MediaSpan,
    ModelContext,
    PostLayer,
    PreLayer,
    WeightPlan,
)

__all__ = ["axes_of", "picture_values", "predict", "write_model"]

light_api = 1

FAMILY = Family(name="echo", architectures=("EchoForCausalLM",), attention="none", media=("image",))
RULES = ("repeat", "checksum")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
ROLES = ("system", "user", "assistant")
IMAGE_TOKEN = "<image>"
PATCH = 16
NO_TENSORS = struct.pack("<Q", 8) + b"{}      "
"""A safetensors file: the length of its header in bytes, and a header that names no tensor."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


def predict(prompt: Sequence[int], count: int, config: Mapping[str, Any], spans: Sequence[MediaSpan] = ()) -> list[int]:
    """The `count` tokens that follow `prompt`, end-of-sequence or not.

    Args:
        prompt: with the values of pictures in their places.
        count: tokens to generate.
        config: the contents of config.json.
        spans: of the pictures, for "grid".
    """
    tokens, output, first = list(prompt), [], config["echo_first"]
    placed = config.get("echo_media") == "grid"
    axes, delta = axes_of(len(prompt), spans)
    if placed:
        tokens = [token + _weight(place) for token, place in zip(tokens, axes, strict=True)]
    for _ in range(count):
        if config["echo_rule"] == "checksum":
            total = sum((i + 1) * (token + 1) for i, token in enumerate(tokens))
            output.append(first + total % (config["vocab_size"] - first))
        else:
            period = config["echo_period"] or 1 + tokens[0] % 8
            output.append(tokens[len(tokens) - period] if len(tokens) >= period else tokens[0])
        tokens.append(output[-1] + (_weight((len(tokens) + delta,) * 3) if placed else 0))
    return output


def picture_values(width: int, height: int, rgb: bytes, config: Mapping[str, Any]) -> list[int]:
    """The tokens that a picture counts as, patch by patch; `rgb` has 3 bytes a pixel, row by row."""
    first = config["echo_first"]
    values = []
    for top in range(0, height, PATCH):
        for left in range(0, width, PATCH):
            total = 0
            for y in range(top, min(top + PATCH, height)):
                for x in range(left, min(left + PATCH, width)):
                    at = 3 * (y * width + x)
                    total += (1 + x - left + 3 * (y - top)) * (rgb[at] + 2 * rgb[at + 1] + 5 * rgb[at + 2])
            values.append(first + total % (config["vocab_size"] - first))
    return values


def axes_of(length: int, spans: Sequence[MediaSpan]) -> tuple[list[tuple[int, int, int]], int]:
    """Positions of the three axes of a prompt, and what is added to later ones: text counts on in all of them; a picture
    stays where it begins in the first, and counts its rows and columns in the others (arXiv 2409.12191)."""
    places: list[tuple[int, int, int]] = []
    at = 0
    for span in spans:
        count = span.start - len(places)
        places += [(at + i,) * 3 for i in range(count)]
        at += count
        _, rows, columns = span.grid
        places += [(at, at + i // columns, at + i % columns) for i in range(span.num_tokens)]
        at += max(rows, columns)
    places += [(at + i,) * 3 for i in range(length - len(places))]
    return places, at - spans[-1].start - spans[-1].num_tokens if spans else 0


def _weight(place: Sequence[int]) -> int:
    return sum((axis + 1) * position for axis, position in enumerate(place))


def write_model(
    folder: str | Path,
    *,
    echo_rule: str = "repeat",
    echo_period: int | None = None,
    num_words: int = 256,
    num_layers: int = 2,
    max_len: int = 2048,
    step_delay_ms: float = 0.0,
    echo_media: str | None = None,
) -> dict[str, Any]:
    """Writes a model folder for the family: config.json, a checkpoint without tensors, and a tokenizer with one token a word.

    The words are "w0" … "w{num_words - 1}" and the roles of chats; "</s>" ends the output where it is echoed. The chat
    template puts each message's role before its content.

    Args:
        folder: made if it is not there.
        echo_rule, echo_period: as the module says.
        num_words: size of the vocabulary beside special tokens and roles.
        num_layers: layers that keep KV; each reads its own and all must agree.
        max_len: longest request in tokens.
        step_delay_ms: how long every step takes at least, on a CPU.
        echo_media: "flat" or "grid" to see pictures.

    Returns:
        The contents of config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL_TOKENS, *ROLES, *(f"w{i}" for i in range(num_words)), *([IMAGE_TOKEN] if echo_media else ())]
    config = {
        "architectures": list(FAMILY.architectures),
        "vocab_size": len(words),
        "num_hidden_layers": num_layers,
        "max_position_embeddings": max_len,
        "bos_token_id": words.index("<s>"),
        "eos_token_id": words.index("</s>"),
        "pad_token_id": words.index("<pad>"),
        "dtype": "float32",
        "echo_rule": echo_rule,
        "echo_period": echo_period,
        "echo_first": len(SPECIAL_TOKENS) + len(ROLES),
        "step_delay_ms": step_delay_ms,
        "echo_media": echo_media,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.safetensors").write_bytes(NO_TENSORS)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(words), indent=1))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return config


def _tokenizer(words: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json that splits at white space and looks words up."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for i, word in enumerate(words) if word in (*SPECIAL_TOKENS, IMAGE_TOKEN)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }


@hookimpl
def light_register_families(registry: FamilyRegistry) -> None:
    registry.add(FAMILY)


@hookimpl
def light_weight_plan(model: ModelContext) -> WeightPlan | None:
    return WeightPlan(()) if model.family.name == FAMILY.name else None


@hookimpl
def light_kv_layout(model: ModelContext) -> KVLayout | None:
    if model.family.name != FAMILY.name:
        return None
    rule = getattr(model.config, "echo_rule", None)
    if rule not in RULES:
        raise ModelError(f"echo_rule {rule!r} is not known", f"known: {', '.join(RULES)}", "write the folder with write_model")
    return KVLayout((KVGroup(tuple(range(model.config.num_hidden_layers)), (KVPlane("token", (1,), "int32"),)),))


@hookimpl
def light_media_encoders(model: ModelContext) -> tuple[MediaEncoder, ...] | None:
    if model.family.name != FAMILY.name or not getattr(model.config, "echo_media", None):
        return None
    from light_sdk.testing.echo_model import create_encoder

    return (create_encoder(model),)


@hookimpl
def light_pre_layer(model: ModelContext) -> PreLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_sdk.testing.echo_model import EchoPre

    return EchoPre(model)


@hookimpl
def light_layer(model: ModelContext, layer_id: int) -> Layer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_sdk.testing.echo_model import EchoLayer

    return EchoLayer(model)


@hookimpl
def light_post_layer(model: ModelContext) -> PostLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_sdk.testing.echo_model import EchoPost

    return EchoPost(model)
