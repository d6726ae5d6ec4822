"""What one token keeps in a Mixtral: its keys, rotated, and its values."""

from light_mixtral.config import MixtralShape
from light_sdk import KVGroup, KVLayout, KVPlane, ModelContext

__all__ = ["kv_layout"]


def kv_layout(model: ModelContext) -> KVLayout:
    """The same in every layer; nothing beyond the window where there is one."""
    shape = MixtralShape.from_config(model.config)
    token = (shape.num_kv_heads, shape.head_dim)
    planes = (KVPlane("k", token, model.dtype), KVPlane("v", token, model.dtype))
    return KVLayout((KVGroup(tuple(range(shape.num_layers)), planes, shape.window),), shape.rope.max_shared_len)
