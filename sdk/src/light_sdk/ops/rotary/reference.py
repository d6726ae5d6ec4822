"""`rotary` in plain torch: the definition.

Pairs of dimensions are turned by an angle that grows with the position (Su et al. 2021, arXiv 2104.09864). What the
angles are (scalings such as YaRN) is decided by whoever computes cosines and sines.
"""

import torch

__all__ = ["rotary"]


def rotary(q_THD: torch.Tensor, k_TKD: torch.Tensor, cos_sin_TR: torch.Tensor, interleaved: bool = False) -> None:
    """Turns the first `rotary_dim` dimensions of queries and keys in place; the others stay.

    Args:
        q_THD: `[T, H, D]`, overwritten; may be a view with strides.
        k_TKD: `[T, K, D]`, overwritten; as q.
        cos_sin_TR: float32 `[T, rotary_dim]`: rotary_dim / 2 cosines, then as many sines, for each token.
        interleaved: a pair is dimensions (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
    """
    cos, sin = cos_sin_TR.unsqueeze(1).chunk(2, dim=-1)
    for x in (q_THD, k_TKD):
        _rotate(x[..., : cos_sin_TR.shape[-1]], cos, sin, interleaved)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    a, b = first.float(), second.float()
    turned = a * cos - b * sin, b * cos + a * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
