"""What a family's `model.py` is made of.

Modules of torch for inference: parameters are uninitialised and without gradients, built on the context's device and
dtype, and every op is selected in the constructor (`ModelContext.ops`). The caller runs them in
`torch.inference_mode`. Tensors are views where that is free; who overwrites what stands in each `forward`.

    rope.py       frequencies of every rotary scaling          rotary.py     cosines and sines, and the rotation
    linear.py     products, embedding, language-model head     norm.py       RMSNorm, LayerNorm, with residual
    attention.py  attention over the KV pool, ALiBi            mlp.py        feed-forward blocks
    media.py      a module in another's place; the pre layer of models that take media
    vision.py     patches and layers of vision transformers
    latent_attention.py  multi-head latent attention: keys and values as one latent
    experts.py    router and experts of sparse models
    residual.py   a block's result, added to the residual by the block itself or by the next norm
    wanted.py     what goes on behind the last layer's attention
    block_fp8.py  products and feed-forward blocks with float8 weights, where checkpoint and machine have them
"""

from light_sdk.layers.attention import Attention, alibi_slopes
from light_sdk.layers.block_fp8 import (
    BlockFP8Experts,
    BlockFP8GatedMLP,
    BlockFP8Linear,
    create_experts,
    create_gated_mlp,
    create_linear,
)
from light_sdk.layers.experts import Experts, MoE, Router, Routing
from light_sdk.layers.latent_attention import LatentAttention, latent_plane
from light_sdk.layers.linear import Embedding, Linear, LMHead, MergedLinear
from light_sdk.layers.media import MediaPreLayer, ModuleWrapper
from light_sdk.layers.mlp import MLP, GatedMLP
from light_sdk.layers.norm import LayerNorm, RMSNorm
from light_sdk.layers.residual import onto
from light_sdk.layers.rope import ROPE_TYPES, RopeParameters
from light_sdk.layers.rotary import Rotary, RotaryEmbedding, share_rotation
from light_sdk.layers.vision import PatchEmbedding, VisionAttention, VisionLayer
from light_sdk.layers.wanted import wanted_rows

__all__ = [
    "MLP",
    "ROPE_TYPES",
    "Attention",
    "BlockFP8Experts",
    "BlockFP8GatedMLP",
    "BlockFP8Linear",
    "Embedding",
    "Experts",
    "GatedMLP",
    "LMHead",
    "LatentAttention",
    "LayerNorm",
    "Linear",
    "MediaPreLayer",
    "MergedLinear",
    "MoE",
    "ModuleWrapper",
    "PatchEmbedding",
    "RMSNorm",
    "RopeParameters",
    "Rotary",
    "RotaryEmbedding",
    "Router",
    "Routing",
    "VisionAttention",
    "VisionLayer",
    "alibi_slopes",
    "create_experts",
    "create_gated_mlp",
    "create_linear",
    "latent_plane",
    "onto",
    "share_rotation",
    "wanted_rows",
]
