"""What one token keeps in a Qwen: its keys, rotated, and its values."""

from light_qwen.config import QwenShape
from light_sdk import KVGroup, KVLayout, KVPlane, ModelContext

__all__ = ["kv_layout"]


def kv_layout(model: ModelContext) -> KVLayout:
    """The same planes in every layer; layers with a sliding window are a group of their own."""
    shape = QwenShape.from_config(model.config)
    token = (shape.num_kv_heads, shape.head_dim)
    planes = (KVPlane("k", token, model.dtype), KVPlane("v", token, model.dtype))
    layers: dict[int | None, list[int]] = {}
    for layer_id, window in enumerate(shape.windows):
        layers.setdefault(window, []).append(layer_id)
    groups = tuple(KVGroup(tuple(ids), planes, window) for window, ids in layers.items())
    # Log-n scales queries alone, so that only the stretched rotary base makes keys depend on the prompt's length.
    return KVLayout(groups, shape.ntk_len if shape.first_generation else shape.rope.max_shared_len)
