"""Rotary position embedding in a model: cosines and sines once a step, rotation in every layer."""

import torch
from torch import nn

from light_core.types import KVView, ModelContext, Step
from light_sdk.layers.rope import RopeParameters

__all__ = ["Rotary", "RotaryEmbedding", "share_rotation", "shared_rotation"]

_SHARED = "rotary_cos_sin"


def share_rotation(step: Step, cos_sin: torch.Tensor) -> None:
    """Leaves `cos_sin` (float32 `[T, rotary_dim]`, cosines before sines) in `step.shared` for every layer's `Rotary`.

    For a family whose frequencies follow a rule of its own; `RotaryEmbedding` does it by itself.
    """
    step.shared[_SHARED] = cos_sin


def shared_rotation(step: Step) -> torch.Tensor:
    """The cosines and sines that the pre layer left for this step, float32 `[T, rotary_dim]`."""
    cos_sin: torch.Tensor = step.shared[_SHARED]
    return cos_sin


class RotaryEmbedding(nn.Module):
    """Leaves the step's cosines and sines in `step.shared` for every layer's `Rotary`. Belongs in the pre layer.

    Where rotation depends on the position alone they are gathered from a table `[max_model_len, rotary_dim]`; longrope
    has two tables and takes the one that `step.context_lens` asks for; dynamic scaling computes them. Shapes are fixed
    and nothing synchronises, so that all of them run under CUDA graphs.

    Args:
        model: the model being built.
        rope: its rotary parameters.
    """

    def __init__(self, model: ModelContext, rope: RopeParameters) -> None:
        super().__init__()
        self.rope, self.max_len = rope, model.limits.max_model_len
        if rope.rope_type == "dynamic":
            self.exponents = nn.Buffer(rope.exponents().to(model.device), persistent=False)
            return
        tables = [self._table(long) for long in ((False, True) if rope.rope_type == "longrope" else (False,))]
        self.table = nn.Buffer(torch.cat(tables).to(model.device), persistent=False)

    def _table(self, long: bool) -> torch.Tensor:
        """Cosines, then sines, of every position: float32 `[max_model_len, rotary_dim]` on the CPU."""
        positions = torch.arange(self.max_len, dtype=torch.float32, device="cpu")
        return self._cos_sin(positions[:, None] * self.rope.inverse_frequencies(long))

    def _cos_sin(self, angles: torch.Tensor) -> torch.Tensor:
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        factor = self.rope.attention_factor
        return cos_sin if factor == 1.0 else cos_sin * factor

    def forward(self, step: Step) -> torch.Tensor:
        """float32 `[T, rotary_dim]`, which is also left in `step.shared`."""
        if self.rope.rope_type == "dynamic":
            base = self.rope.dynamic_base(step.context_lens)[:, None]
            cos_sin = self._cos_sin(step.positions.float()[:, None] * base**-self.exponents)
        elif self.rope.rope_type == "longrope":
            is_long = step.context_lens > self.rope.original_len
            cos_sin = self.table.index_select(0, step.positions + is_long * self.max_len)
        else:
            cos_sin = self.table.index_select(0, step.positions)
        share_rotation(step, cos_sin)
        return cos_sin


class Rotary(nn.Module):
    """Rotates queries and keys in place by the step's cosines and sines (arXiv 2104.09864).

    Args:
        model: the model being built.
        head_dim: of queries and keys.
        rotary_dim: leading dimensions that are rotated.
        interleaved: pairs are neighbours (0 1, 2 3, …), not halves.
    """

    def __init__(self, model: ModelContext, head_dim: int, rotary_dim: int, interleaved: bool = False) -> None:
        super().__init__()
        self.interleaved = interleaved
        self._rotary = model.ops.select("rotary", head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
        self._rotary_kv = model.ops.select("rotary_kv", head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved)

    def forward(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, step: Step) -> None:
        """Overwrites `q_THD` and `k_TKD`, which may be views of one tensor."""
        self._rotary(q_THD, k_TKD, step.shared[_SHARED], self.interleaved)

    def write(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, step: Step, kv: KVView) -> None:
        """As `forward`, and stores keys and values in `kv` at `step.slots`."""
        self._rotary_kv(q_THD, k_TKD, v_TKD, step.shared[_SHARED], kv["k"], kv["v"], step.slots, self.interleaved)
