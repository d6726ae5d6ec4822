"""The echo family's layers; `echo.py` states the rule that they follow.

Hidden states are float32 `[T, 1]`: the token that follows each token, or -1 where two layers disagree about it, which
no sound KV pool lets happen. Only the rows whose logits are wanted are worked out.
"""

import time

import torch
from torch import nn

from light_core.types import Hidden, KVView, ModelContext, Step

__all__ = ["EchoLayer", "EchoPost", "EchoPre"]

LOGIT = 50.0
UNDECIDED = -2.0
"""What the pre layer gives; the first layer replaces it."""
TORN = -1.0
"""What layers give that disagree with one before."""


class EchoPre(nn.Module):
    """Starts with no opinion, and spends the step's delay."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        self.delay_s = float(getattr(model.config, "step_delay_ms", 0.0)) / 1000 if model.device == "cpu" else 0.0

    def forward(self, step: Step) -> Hidden:
        if self.delay_s:
            time.sleep(self.delay_s)
        return Hidden(torch.full((step.num_tokens, 1), UNDECIDED, dtype=torch.float32, device=step.token_ids.device))


class EchoLayer(nn.Module):
    """Writes the step's token ids to its plane, and works the next token out from what the plane holds."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        config = model.config
        self.checksum = config.echo_rule == "checksum"
        self.period, self.first, self.vocab_size = config.echo_period, config.echo_first, config.vocab_size

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        plane_S = kv["token"][:, 0]
        plane_S[step.slots] = step.token_ids
        rows = step.logits_rows
        request_R = torch.searchsorted(step.cu_seqlens_q, rows.int(), right=True) - 1
        row_R, position_R = step.rows[request_R].long(), step.positions[rows].long()
        rule = self._checksum if self.checksum else self._repeat
        next_R = rule(plane_S, step, row_R, position_R).float()
        before_R = hidden.x[rows, 0]
        agreed_R = (before_R == UNDECIDED) | (before_R == next_R)
        hidden.x[rows, 0] = torch.where(agreed_R, next_R, TORN)
        return hidden

    def _repeat(self, plane_S: torch.Tensor, step: Step, row_R: torch.Tensor, position_R: torch.Tensor) -> torch.Tensor:
        first_R = plane_S[step.slot_table[row_R, 0].long()].long()
        period_R = 1 + first_R % 8 if self.period is None else torch.full_like(first_R, self.period)
        source_R = (position_R + 1 - period_R).clamp(min=0)
        return plane_S[step.slot_table[row_R, source_R].long()]

    def _checksum(self, plane_S: torch.Tensor, step: Step, row_R: torch.Tensor, position_R: torch.Tensor) -> torch.Tensor:
        index_L = torch.arange(step.max_seq_len, device=plane_S.device)
        tokens_RL = plane_S[step.slot_table[row_R, : step.max_seq_len].long()].long()
        terms_RL = ((index_L + 1) * (tokens_RL + 1)).masked_fill(index_L > position_R[:, None], 0)
        return self.first + terms_RL.sum(-1) % (self.vocab_size - self.first)


class EchoPost(nn.Module):
    """Logits that leave no doubt; all zero for a token that is torn or outside the vocabulary."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        self.vocab_size = model.config.vocab_size

    def forward(self, hidden: Hidden, step: Step) -> torch.Tensor:
        next_R1 = hidden.x[step.logits_rows]
        ids_V = torch.arange(self.vocab_size, dtype=torch.float32, device=next_R1.device)
        return torch.where(next_R1 == ids_V, LOGIT, 0.0)
