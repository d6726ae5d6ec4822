"""`rotary` on CPUs: queries and keys in one go where they lie side by side, as in one product of q, k and v."""

import torch

__all__ = ["rotary"]


def rotary(q_THD: torch.Tensor, k_TKD: torch.Tensor, cos_sin_TR: torch.Tensor, interleaved: bool = False) -> None:
    """As the reference; temporaries are float32 and twice the size of what is turned."""
    cos, sin = cos_sin_TR.unsqueeze(1).chunk(2, dim=-1)
    width = cos_sin_TR.shape[-1]
    for x_THD in _joined(q_THD, k_TKD):
        x = x_THD[..., :width]
        pairs = x.view(*x.shape[:2], -1, 2).transpose(-1, -2) if interleaved else x.view(*x.shape[:2], 2, -1)
        _turn(pairs, cos.unsqueeze(2), sin.unsqueeze(2))


def _turn(pairs_TH2P: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """(a, b) to (a cos - b sin, b cos + a sin), in place; cos and sin are `[T, 1, 1, P]`."""
    turned, crossed = pairs_TH2P * cos, pairs_TH2P * sin
    turned[:, :, 0].sub_(crossed[:, :, 1])
    turned[:, :, 1].add_(crossed[:, :, 0])
    pairs_TH2P.copy_(turned)


def _joined(q_THD: torch.Tensor, k_TKD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Both as one tensor of more heads if the keys of each token begin where its queries end, else one after the other."""
    num_tokens, num_heads, head_dim = q_THD.shape
    stride, offset, dense = q_THD.stride(0), q_THD.storage_offset(), (head_dim, 1)
    beside = k_TKD.storage_offset() == offset + num_heads * head_dim and (num_tokens == 1 or k_TKD.stride(0) == stride)
    if not (beside and q_THD.stride()[1:] == k_TKD.stride()[1:] == dense and _share_memory(q_THD, k_TKD)):
        return q_THD, k_TKD
    return (q_THD.as_strided((num_tokens, num_heads + k_TKD.shape[1], head_dim), (stride, *dense), offset),)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
