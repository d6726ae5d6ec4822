"""Positions on three axes (M-RoPE): frame, row and column of a picture's tokens, and the same number thrice for text.

Wang et al., "Qwen2-VL" (arXiv 2409.12191, section 2.1): all tokens of a picture have the frame's position, and rows and
columns count from it; what follows goes on after the largest position that the picture has. Core calls `positions` once a
request, and keeps what is to be added to the positions of generated tokens.
"""

from collections.abc import Sequence

import torch

from light_sdk import MediaSpan

__all__ = ["positions"]


def positions(length: int, spans: Sequence[MediaSpan]) -> tuple[torch.Tensor, int]:
    """Positions of a prompt's tokens.

    Args:
        length: tokens of the prompt.
        spans: its pictures in order; `grid` is their rows and columns of tokens.

    Returns:
        int32 `[3, length]`, and what is added to the index of every later token, 0 or less.
    """
    axes = torch.arange(length, dtype=torch.int32).repeat(3, 1)
    shift = 0
    for span in spans:
        rows, columns = span.grid
        begin, end = span.start, span.start + span.num_tokens
        tokens = torch.arange(span.num_tokens, dtype=torch.int32)
        first = begin + shift
        axes[:, begin:end] = first + torch.stack((torch.zeros_like(tokens), tokens // columns, tokens % columns))
        shift += max(rows, columns) - span.num_tokens
        axes[:, end:] = torch.arange(end, length, dtype=torch.int32) + shift
    return axes, shift
