"""What one token keeps in a DeepSeek: its latent and its rotary key, for all heads together."""

from light_deepseek.config import DeepseekShape
from light_sdk import KVGroup, KVLayout, ModelContext
from light_sdk.layers import latent_plane

__all__ = ["kv_layout"]


def kv_layout(model: ModelContext) -> KVLayout:
    """The same in every layer: 512 + 64 numbers in the published models, 1,152 bytes in bfloat16."""
    shape = DeepseekShape.from_config(model.config)
    plane = latent_plane(shape.kv_rank, shape.rotary_dim, model.dtype)
    return KVLayout((KVGroup(tuple(range(shape.num_layers)), (plane,)),), shape.rope.max_shared_len)
