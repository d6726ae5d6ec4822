"""`rms_norm` on CPUs through torch's fused layer norm: half the calls of the reference, and no float32 copies.

The values beside their negatives have mean 0, so that their variance is the mean square of the values:
layer_norm([x, -x]) = [x, -x] / sqrt(mean(x^2) + eps).
"""

import torch
import torch.nn.functional as F

__all__ = ["rms_norm"]


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> None:
    """As the reference, bit by bit in half precision; a temporary of three times the size of `x`."""
    if residual is not None:
        x = residual.add_(x)
    width = x.shape[-1]
    both = F.layer_norm(torch.cat((x, x.neg()), dim=-1), (2 * width,), None, None, eps)
    torch.mul(both[..., :width], weight, out=out)
