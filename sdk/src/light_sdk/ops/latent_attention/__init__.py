"""The op `latent_attention`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.latent_attention.reference import latent_attention

__all__ = ["latent_attention"]
