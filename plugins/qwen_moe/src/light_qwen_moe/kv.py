"""What one token keeps: its keys, rotated, and its values."""

from light_qwen_moe.config import QwenMoeShape
from light_sdk import KVGroup, KVLayout, KVPlane, ModelContext

__all__ = ["kv_layout"]


def kv_layout(model: ModelContext) -> KVLayout:
    """The same planes in every layer; a group for each window."""
    shape = QwenMoeShape.from_config(model.config)
    token = (shape.num_kv_heads, shape.head_dim)
    planes = (KVPlane("k", token, model.dtype), KVPlane("v", token, model.dtype))
    by_window = {window: tuple(i for i, other in enumerate(shape.windows) if other == window) for window in shape.windows}
    return KVLayout(tuple(KVGroup(layers, planes, window) for window, layers in by_window.items()), shape.rope.max_shared_len)
