"""What a family's `model.py` is made of.

Modules of torch for inference: parameters are uninitialised and without gradients, built on the context's device and
dtype, and every op is selected in the constructor (`ModelContext.ops`). The caller runs them in
`torch.inference_mode`. Tensors are views where that is free; who overwrites what stands in each `forward`.

    rope.py       frequencies of every rotary scaling          rotary.py     cosines and sines, and the rotation
    linear.py     products, embedding, language-model head     norm.py       RMSNorm, LayerNorm, with residual
    attention.py  attention over the KV pool, ALiBi            mlp.py        feed-forward blocks
"""

from light_sdk.layers.attention import Attention, alibi_slopes
from light_sdk.layers.linear import Embedding, Linear, LMHead, MergedLinear
from light_sdk.layers.mlp import MLP, GatedMLP
from light_sdk.layers.norm import LayerNorm, RMSNorm
from light_sdk.layers.rope import ROPE_TYPES, RopeParameters
from light_sdk.layers.rotary import Rotary, RotaryEmbedding

__all__ = [
    "MLP",
    "ROPE_TYPES",
    "Attention",
    "Embedding",
    "GatedMLP",
    "LMHead",
    "LayerNorm",
    "Linear",
    "MergedLinear",
    "RMSNorm",
    "RopeParameters",
    "Rotary",
    "RotaryEmbedding",
    "alibi_slopes",
]
