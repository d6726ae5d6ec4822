"""LLaVAs as they are published: config.json and every tensor of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf, llava-v1.6-mistral-7b-hf
and llava-v1.6-vicuna-13b-hf, with old names and new ones, and of liuhaotian/llava-v1.5-7b, llava-v1.5-13b, llava-v1.6-mistral-7b and
llava-v1.6-vicuna-13b, those of 1.5 beside openai/clip-vit-large-patch14-336; without values.

Loaded on "meta" as any checkpoint is, so that names, shapes, merges and folders are those of a real load.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from light_sdk import CheckpointError
from light_sdk.testing.published import affine_tensors, decoder_tensors, load_published

PLUGINS = ("light_llama.hooks", "light_llava.hooks")
CLIP = "openai/clip-vit-large-patch14-336"
VICUNA_7B: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = VICUNA_7B | {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MM_ENTRIES = {
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": CLIP,
    "tie_word_embeddings": False,
}
Shapes = dict[str, tuple[int, ...]]


def hugging_face(text: dict[str, Any], is_next: bool) -> dict[str, Any]:
    """config.json of llava-hf. Sizes of a Vicuna of 7 B, which are transformers' defaults, are left out there."""
    kind = "mistral" if "sliding_window" in text else "llama"
    entries = {name: value for name, value in text.items() if VICUNA_7B.get(name) != value}
    shared = {
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": entries | {"model_type": kind, "max_position_embeddings": text["max_position_embeddings"], "vocab_size": 32064},
        "tie_word_embeddings": False,
        "vision_config": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if not is_next:
        return shared | {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    tiles = {"image_grid_pinpoints": PINPOINTS, "use_image_newline_parameter": True}
    return shared | tiles | {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}


def original(text: dict[str, Any], is_next: bool) -> dict[str, Any]:
    """config.json of liuhaotian."""
    names = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
    if "sliding_window" in text:
        names = {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
    tiles = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": "spatial_unpad"}
    return text | MM_ENTRIES | names | (tiles if is_next else {"image_aspect_ratio": "pad"})


def transformer(prefix: str, layers: int, size: int) -> Shapes:
    """The layers of one half of CLIP."""
    found: Shapes = {}
    for i in range(layers):
        layer = f"{prefix}encoder.layers.{i}"
        found |= affine_tensors(f"{layer}.layer_norm1", size) | affine_tensors(f"{layer}.layer_norm2", size)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= affine_tensors(f"{layer}.self_attn.{part}", size, size)
        found |= affine_tensors(f"{layer}.mlp.fc1", 4 * size, size) | affine_tensors(f"{layer}.mlp.fc2", size, 4 * size)
    return found


def tower(prefix: str) -> Shapes:
    """The vision half."""
    embeddings = {"class_embedding": (1024,), "patch_embedding.weight": (1024, 3, 14, 14), "position_embedding.weight": (577, 1024)}
    found: Shapes = {f"{prefix}embeddings.{name}": shape for name, shape in embeddings.items()}
    found |= transformer(prefix, 24, 1024)
    return found | affine_tensors(f"{prefix}pre_layrnorm", 1024) | affine_tensors(f"{prefix}post_layernorm", 1024)


def clip_tensors() -> Shapes:
    """The whole of CLIP, with the numbers of its positions, which old files hold."""
    found = tower("vision_model.") | transformer("text_model.", 12, 768) | affine_tensors("text_model.final_layer_norm", 768)
    found |= {"text_model.embeddings.token_embedding.weight": (49408, 768), "text_model.embeddings.position_embedding.weight": (77, 768)}
    found |= {"text_projection.weight": (768, 768), "visual_projection.weight": (768, 1024), "logit_scale": ()}
    return found | {"text_model.embeddings.position_ids": (1, 77), "vision_model.embeddings.position_ids": (1, 577)}


def projector(first: str, second: str, size: int) -> Shapes:
    return affine_tensors(first, size, 1024) | affine_tensors(second, size, size)


def old_names(text: dict[str, Any], is_next: bool) -> Shapes:
    """Those of llava-hf's files."""
    size = text["hidden_size"]
    found = decoder_tensors(text | {"vocab_size": 32064}, "language_model.model.") | tower("vision_tower.vision_model.")
    found |= projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2", size)
    return found | {"language_model.lm_head.weight": (32064, size)} | ({"image_newline": (size,)} if is_next else {})


def new_names(text: dict[str, Any], is_next: bool) -> Shapes:
    """Those of transformers' modules since 4.52."""
    renamed = {}
    for name, shape in old_names(text, is_next).items():
        bare = name.replace("language_model.model.", "language_model.")
        renamed["lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{bare}"] = shape
    return renamed


def original_names(text: dict[str, Any], is_next: bool) -> Shapes:
    """Those of liuhaotian's files: 1.6 has its tower inside, 1.5 the frequencies of its rotation."""
    size = text["hidden_size"]
    found = (
        decoder_tensors(text, "model.")
        | projector("model.mm_projector.0", "model.mm_projector.2", size)
        | {"lm_head.weight": (32000, size)}
    )
    if is_next:
        return found | tower("model.vision_tower.vision_tower.vision_model.") | {"model.image_newline": (size,)}
    return found | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(text["num_hidden_layers"])}


UNSEEN = 12 * 1024**2 + 13 * 1024 + 2 * 1024
"""The tower's last layer and its last norm, which are not looked at."""
NOT_PARAMETERS = ("inv_freq", "position_ids")


@pytest.mark.parametrize(
    ("text", "is_next", "num_parameters"),
    [
        (VICUNA_7B, False, 7_063_427_072),
        (VICUNA_13B, False, 13_351_494_656),
        (MISTRAL_7B, True, 7_566_747_648),
        (VICUNA_13B, True, 13_351_499_776),
    ],
    ids=["1.5-7b", "1.5-13b", "1.6-mistral-7b", "1.6-vicuna-13b"],
)
@pytest.mark.parametrize("names", [old_names, new_names])
def test_published_checkpoints_fit(text: dict[str, Any], is_next: bool, num_parameters: int, names: Any, tmp_path: Path) -> None:
    shapes = names(text, is_next)
    assert sum(map(math.prod, shapes.values())) == num_parameters
    assert load_published(tmp_path, PLUGINS, hugging_face(text, is_next), shapes) == num_parameters - UNSEEN


@pytest.mark.parametrize(
    ("text", "is_next", "num_parameters"),
    [
        (VICUNA_7B, False, 6_759_395_328),
        (VICUNA_13B, False, 13_047_331_840),
        (MISTRAL_7B, True, 7_566_223_360),
        (VICUNA_13B, True, 13_350_844_416),
    ],
    ids=["1.5-7b", "1.5-13b", "1.6-mistral-7b", "1.6-vicuna-13b"],
)
def test_published_originals_fit(text: dict[str, Any], is_next: bool, num_parameters: int, tmp_path: Path) -> None:
    shapes = original_names(text, is_next)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(NOT_PARAMETERS)}
    assert sum(sizes.values()) == num_parameters
    seen = num_parameters if is_next else num_parameters + sum(map(math.prod, tower("").values()))
    beside = {} if is_next else {CLIP: ({"model_type": "clip", "vision_config": VISION}, clip_tensors())}
    assert load_published(tmp_path, PLUGINS, original(text, is_next), shapes, beside) == seen - UNSEEN


def test_the_tower_is_the_published_one() -> None:
    """All of CLIP ViT-L/14 at 336 pixels has 427.9 M parameters."""
    sizes = {name: math.prod(shape) for name, shape in clip_tensors().items() if not name.endswith(NOT_PARAMETERS)}
    assert sum(sizes.values()) == 427_944_193


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda shapes: shapes.pop("model.mm_projector.2.bias"), "mm_projector.2.bias"),
        (lambda shapes: shapes.update({"model.image_newline": (7, 7)}), "image_newline"),
        (lambda shapes: shapes.update({"model.mm_projector.4.weight": (4096,)}), "model.mm_projector.4.weight"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_what_is_not_as_published_is_named(change: Any, named: str, tmp_path: Path) -> None:
    shapes = original_names(MISTRAL_7B, True)
    change(shapes)
    with pytest.raises(CheckpointError) as caught:
        load_published(tmp_path, PLUGINS, original(MISTRAL_7B, True), shapes)
    assert named in str(caught.value)
