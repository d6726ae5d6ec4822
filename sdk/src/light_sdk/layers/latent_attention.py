"""Multi-head latent attention over token-indexed latents (arXiv 2405.04434, section 2.1)."""

import torch
from torch import nn

from light_core.types import KVPlane, KVView, ModelContext, Step
from light_sdk.layers.norm import parameter
from light_sdk.layers.rotary import shared_rotation
from light_sdk.layers.wanted import wanted_rows

__all__ = ["LatentAttention", "latent_plane"]

_PLANE = "latent"


def latent_plane(rank: int, rotary_dim: int, dtype: str) -> KVPlane:
    """What a token keeps for `LatentAttention`: its latent, then its rotary key, in one row.

    One row is read as a whole, by absorbed and by decompressed attention alike; the rotary key in a plane of its own
    would be a second access of a few bytes for each token.
    """
    return KVPlane(_PLANE, (rank + rotary_dim,), dtype)


class LatentAttention(nn.Module):
    """Writes the step's latents to the layer's KV, then attends causally over each request's past.

    Parameters: `norm_weight` `[rank]`, of the norm of the latents; `kv_b_weight` `[num_heads * (key_dim + value_dim),
    rank]`, as checkpoints have it in `kv_b_proj`: it makes keys and values of latents, and serves both ways of
    attending (see the ops `latent_attention` and `mla_attention`).

    Args:
        model: the model being built.
        num_heads: of queries, keys and values.
        rank: of the latents (`kv_lora_rank`).
        key_dim: width of a head's query and key without positions (`qk_nope_head_dim`).
        rotary_dim: width of the rotated part behind it (`qk_rope_head_dim`).
        value_dim: width of a head's value.
        norm_eps: of the norm of the latents.
        scale: of the scores; None is (key_dim + rotary_dim) ** -0.5.
        interleaved: rotated pairs are neighbours, not halves.
    """

    def __init__(
        self,
        model: ModelContext,
        num_heads: int,
        rank: int,
        key_dim: int,
        rotary_dim: int,
        value_dim: int,
        norm_eps: float,
        scale: float | None = None,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.norm_eps, self.interleaved = norm_eps, interleaved
        self.scale = (key_dim + rotary_dim) ** -0.5 if scale is None else scale
        self.norm_weight = parameter(rank)
        self.kv_b_weight = parameter(num_heads * (key_dim + value_dim), rank)
        sizes = {"num_heads": num_heads, "rank": rank, "key_dim": key_dim, "rotary_dim": rotary_dim, "value_dim": value_dim}
        sizes["kv_width"] = key_dim + rotary_dim + value_dim
        self._attention = model.ops.select("latent_attention", **sizes)
        self._write = model.ops.select("write_latent", rank=rank, rotary_dim=rotary_dim)
        self._attend = model.ops.select("mla_attention", **sizes)

    def forward(self, q_THD: torch.Tensor, kv_TC: torch.Tensor, step: Step, kv: KVView) -> torch.Tensor:
        """A new `[T, H * value_dim]`, or `[R, H * value_dim]` where `step.wanted` is not None.

        Args:
            q_THD: queries, the rotary part last; that part is overwritten.
            kv_TC: latent and rotary key of each token, neither normalised nor rotated.
            step: the step.
            kv: takes the latents at `step.slots`.
        """
        kv_b_HXL = self.kv_b_weight.view(self.num_heads, self.key_dim + self.value_dim, -1)
        norm, rotation = (self.norm_weight, self.norm_eps), (shared_rotation(step), self.interleaved)
        if step.wanted is not None:
            self._write(q_THD[..., self.key_dim :], kv_TC, *norm, *rotation, kv[_PLANE], step.slots)
            q_RHD = wanted_rows(q_THD, step)
            out_RHO = q_RHD.new_empty((q_RHD.shape[0], self.num_heads, self.value_dim))
            self._attend(out_RHO, q_RHD, kv[_PLANE], kv_b_HXL, step.wanted, self.scale)
            return out_RHO.flatten(1)
        out_THO = q_THD.new_empty((q_THD.shape[0], self.num_heads, self.value_dim))
        self._attention(out_THO, q_THD, kv_TC, *norm, *rotation, kv[_PLANE], kv_b_HXL, step, self.scale)
        return out_THO.flatten(1)
