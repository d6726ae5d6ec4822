"""The op `write_latent`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.write_latent.reference import write_latent

__all__ = ["write_latent"]
