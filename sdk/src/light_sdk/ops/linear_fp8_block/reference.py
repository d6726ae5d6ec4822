"""`linear_fp8_block` in plain torch: the definition. Products with weights in float8 that carry a scale for each block.

    out[t, o] = sum over groups g of 128 inputs:   s_x[t, g] * s_w[o // 128, g] * (x8[t, g] . w8[o, g])   + bias[o]

x8 is x / s_x rounded to float8 e4m3, with s_x such that the largest magnitude of the group becomes 448, the largest
of the format. Source: arXiv 2412.19437, section 3.3 (tiles of 1 x 128 for activations, blocks of 128 x 128 for
weights).
"""

import torch

__all__ = ["BLOCK", "FLOAT8_MAX", "LEAST_AMAX", "dequantize_blocks", "linear_fp8_block", "quantize_groups"]

BLOCK = 128
"""Side of a weight's blocks and length of an activation's groups."""
FLOAT8_MAX = 448.0
LEAST_AMAX = 1e-10
"""A group whose magnitudes are all below has this one's scale, so that zeros do not divide by zero."""


def linear_fp8_block(x_TI: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b with W in float8 and x quantised on the way; accumulated in float32.

    Args:
        x_TI: `[..., I]`, in any float dtype.
        weight_OI: float8_e4m3fn `[O, I]`.
        scale: float32 `[ceil(O / 128), ceil(I / 128)]`; a block of the weight times its scale is the weight meant.
        bias_O: `[O]`, or None.

    Returns:
        A new `[..., O]` in x's dtype.
    """
    x8, x_scale = quantize_groups(x_TI)
    x = (x8.float().view(*x_scale.shape, BLOCK) * x_scale[..., None]).flatten(-2)[..., : x_TI.shape[-1]]
    out = torch.nn.functional.linear(x, dequantize_blocks(weight_OI, scale))
    return (out if bias_O is None else out + bias_O.float()).to(x_TI.dtype)


def quantize_groups(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x_TI` in groups of 128: float8_e4m3fn `[..., G * 128]`, zeros behind a last group that is shorter, and their
    float32 scales `[..., G]`."""
    padding = -x_TI.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(x_TI.float(), (0, padding))
    groups = padded.reshape(*x_TI.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)
    scale = groups.abs().amax(-1).clamp(min=LEAST_AMAX) / FLOAT8_MAX
    x8 = (groups / scale[..., None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    return x8.flatten(-2), scale


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """The weight meant: float32 `[..., O, I]` of one with a scale for each block of `block` rows and columns."""
    rows, columns = weight.shape[-2:]
    spread = scale.float().repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return weight.float() * spread
