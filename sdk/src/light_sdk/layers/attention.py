"""Attention over token-indexed KV, and the slopes of ALiBi."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from light_core.types import KVView, ModelContext, Step
from light_sdk.layers.rotary import Rotary, shared_rotation
from light_sdk.layers.wanted import wanted_rows

__all__ = ["Attention", "alibi_slopes"]


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (arXiv 2108.12409, section 3).

    For a power of two they are the geometric series that starts with and has the ratio 2^(-8/n). Otherwise the series
    of the next lower power of two is followed by every other slope of the next higher one, as in the authors' code.
    """

    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / n) for head in range(n)]

    lower = 1 << int(math.log2(num_heads))
    return series(lower) + series(2 * lower)[0::2][: num_heads - lower]


class Attention(nn.Module):
    """Writes the step's keys and values to the layer's KV, rotated where asked for, then attends causally over each
    request's past.

    Args:
        model: the model being built.
        num_heads: of queries.
        num_kv_heads: of keys and values; divides `num_heads`.
        head_dim: of all three.
        scale: of the scores; None is head_dim ** -0.5.
        window: a query sees itself and the `window - 1` tokens before it; None for all.
        slopes: of ALiBi, one a head; None for no bias.
        rotary: rotates queries and keys on their way; None where there is no rotation, or it has been done.
    """

    def __init__(
        self,
        model: ModelContext,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float | None = None,
        window: int | None = None,
        slopes: Sequence[float] | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        values = None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=model.device)
        self.register_buffer("slopes", values, persistent=False)
        self.rotary, self._has_slopes = rotary, slopes is not None
        if rotary is None:
            self._write_kv = model.ops.select("write_kv", num_kv_heads=num_kv_heads, head_dim=head_dim)
        self._attention = model.ops.select(
            "attention", num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, alibi=slopes is not None, window=window
        )

    def forward(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, step: Step, kv: KVView) -> torch.Tensor:
        """A new `[T, H * D]`, or `[R, H * D]` where `step.wanted` is not None; `kv` takes the keys and values at `step.slots`.
        Rotation overwrites `q_THD` and `k_TKD`."""
        if step.wanted is not None:
            self._write(q_THD, k_TKD, v_TKD, step, kv)
            q_RHD = wanted_rows(q_THD, step)
            out_RHD = torch.empty_like(q_RHD)
            self._attention(out_RHD, q_RHD, kv["k"], kv["v"], step.wanted, self.scale, self.window, self.slopes)
            return out_RHD.flatten(1)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if not self._is_done_at_once(out_THD, q_THD, k_TKD, v_TKD, step, kv):
            self._write(q_THD, k_TKD, v_TKD, step, kv)
            self._attention(out_THD, q_THD, kv["k"], kv["v"], step, self.scale, self.window, self.slopes, k_TKD, v_TKD)
        return out_THD.flatten(1)

    def _write(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, step: Step, kv: KVView) -> None:
        """Rotates where asked for, and stores the keys and values of all tokens."""
        if self.rotary is None:
            self._write_kv(k_TKD, v_TKD, kv["k"], kv["v"], step.slots)
        else:
            self.rotary.write(q_THD, k_TKD, v_TKD, step, kv)

    def _is_done_at_once(
        self, out_THD: torch.Tensor, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, step: Step, kv: KVView
    ) -> bool:
        """Lets the op rotate, write and attend in one call, where its implementation can, in this step."""
        if self.rotary is None or self._has_slopes:
            return False
        at_once = getattr(self._attention, "with_rotary", None)
        if at_once is None:
            return False
        cos_sin_TR, interleaved = shared_rotation(step), self.rotary.interleaved
        done: bool = at_once(out_THD, q_THD, k_TKD, v_TKD, kv["k"], kv["v"], step, self.scale, self.window, cos_sin_TR, interleaved)
        return done
