"""`linear` on x86 processors: oneDNN's product with a weight that was laid out for it once, when weights were loaded.

A product of few rows reads the weight and does little else. In torch's row-major layout oneDNN reads it at two thirds
of the memory's rate (float32: at less than half), because rows are far apart and are copied into blocks in each call.
"""

import torch
import torch.nn.functional as F

__all__ = ["PackedLinear", "linear"]

# Rows that the layout is chosen for. Those for 1 and for 512 rows are the same in bfloat16; in float32 the one for 16
# is the fastest at 1 and at 64 rows too.
TYPICAL_ROWS = 16

_product = torch.ops.mkldnn._linear_pointwise.default
_reorder = torch.ops.mkldnn._reorder_linear_weight.default


class PackedLinear:
    """The op, and how it wants its weight."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As the reference; `weight` may be what `pack` made of it, and is faster then."""
        if weight.is_mkldnn:
            out: torch.Tensor = _product(x, weight, bias, "none", [], "")
            return out
        return F.linear(x, weight, bias)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of `weight` in oneDNN's blocked layout: same shape and dtype, opaque to all but this op.

        `to_dense()` of it is the weight again, bit by bit.
        """
        packed: torch.Tensor = _reorder(weight, TYPICAL_ROWS)
        return packed


linear = PackedLinear()
