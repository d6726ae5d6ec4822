"""`attend_runs` in plain torch: the definition.

out = softmax(q kᵀ / sqrt(D)) v        (Vaswani et al. 2017, arXiv 1706.03762), over the tokens of one sequence, with no mask
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["attend_runs"]


def attend_runs(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Attention of every token over all tokens of its sequence, and no others; scores are scaled by D ** -0.5.

    Args:
        q_THD, k_THD, v_THD: `[T, H, D]`, strided but for the last dimension.
        runs: (count, length) of sequences of one length that follow one another; together they are the T tokens.

    Returns:
        `[T, H, D]`, contiguous. One call of torch's attention for each run.
    """
    parts, begin = [], 0
    for count, length in runs:
        own = slice(begin, begin + count * length)
        q, k, v = (tensor[own].unflatten(0, (count, length)).transpose(1, 2) for tensor in (q_THD, k_THD, v_THD))  # type: ignore[no-untyped-call]
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        begin += count * length
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
