"""What one token keeps in a BLOOM: keys and values of every head."""

from light_bloom.config import BloomShape
from light_sdk import KVGroup, KVLayout, KVPlane, ModelContext

__all__ = ["kv_layout"]


def kv_layout(model: ModelContext) -> KVLayout:
    """The same in every layer."""
    shape = BloomShape.from_config(model.config)
    token = (shape.num_heads, shape.head_dim)
    planes = (KVPlane("k", token, model.dtype), KVPlane("v", token, model.dtype))
    return KVLayout((KVGroup(tuple(range(shape.num_layers)), planes),))
