"""The echo family's layers; `echo.py` states the rule that they follow.

Hidden states are float32 `[T, 1]`: the token that follows each token, or -1 where two layers disagree about it, which
no sound KV pool lets happen.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from light_core.types import Hidden, KVView, MediaEncoder, MediaSpan, ModelContext, Step
from light_sdk.testing.echo import IMAGE_TOKEN, PATCH, axes_of

__all__ = ["EchoEncoder", "EchoLayer", "EchoPost", "EchoPre", "create_encoder"]

LOGIT = 50.0
UNDECIDED = -2.0
"""What the pre layer gives; the first layer replaces it."""
TORN = -1.0
"""What layers give that disagree with one before."""


FAILS_TO_ENCODE, FAILS_TO_PREPROCESS = (255, 0, 255), (0, 255, 0)
"""First pixels that make trouble."""


def create_encoder(model: ModelContext) -> MediaEncoder:
    """The family's encoder of pictures; `echo.picture_values` says what it computes."""
    grid = model.config.echo_media == "grid"
    return MediaEncoder(
        name="image",
        kind="image",
        preprocess=preprocess,
        num_tokens=lambda tensors: int(grid_of(tensors)[1] * grid_of(tensors)[2]),
        module=EchoEncoder(model),
        placeholder=IMAGE_TOKEN,
        token_id=int(model.config.vocab_size) - 1,
        marker=f"{IMAGE_TOKEN} ",
        grid=grid_of if grid else None,
        positions=positions if grid else None,
    )


def preprocess(data: bytes) -> dict[str, torch.Tensor]:
    """The pixels of a binary PPM, uint8 `[H, W, 3]`."""
    _, size, _, rgb = data.split(b"\n", 3)
    width, height = map(int, size.split())
    if tuple(rgb[:3]) == FAILS_TO_PREPROCESS:
        raise ValueError("a green picture")
    return {"pixels": torch.frombuffer(bytearray(rgb), dtype=torch.uint8).view(height, width, 3)}


def grid_of(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """Frames, rows and columns of patches."""
    height, width, _ = tensors["pixels"].shape
    return 1, -(-height // PATCH), -(-width // PATCH)


def positions(length: int, spans: Sequence[MediaSpan]) -> tuple[torch.Tensor, int]:
    """As `echo.axes_of`."""
    places, delta = axes_of(length, spans)
    return torch.tensor(places, dtype=torch.int32).T, delta


class EchoEncoder(nn.Module):
    """A number for each patch."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        self.first, self.vocab_size = int(model.config.echo_first), int(model.config.vocab_size)

    def forward(self, items: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        return torch.cat([self._values(item["pixels"]) for item in items])[:, None].float()

    def _values(self, pixels_HWC: torch.Tensor) -> torch.Tensor:
        height, width, _ = pixels_HWC.shape
        if tuple(pixels_HWC[0, 0].tolist()) == FAILS_TO_ENCODE:
            raise ValueError("a magenta picture")
        grey_HW = (pixels_HWC.long() * torch.tensor([1, 2, 5], device=pixels_HWC.device)).sum(-1)
        index = torch.arange(PATCH, device=pixels_HWC.device)
        weight_PP = 1 + index + 3 * index[:, None]
        padded = functional.pad(grey_HW, (0, -width % PATCH, 0, -height % PATCH))
        rows, columns = padded.shape[0] // PATCH, padded.shape[1] // PATCH
        patches = padded.view(rows, PATCH, columns, PATCH).transpose(1, 2)
        values: torch.Tensor = (patches * weight_PP).sum((2, 3)).flatten()
        return self.first + values % (self.vocab_size - self.first)


class EchoPre(nn.Module):
    """Starts with no opinion, and spends the step's delay. Leaves what tokens count as in `Step.shared`."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        self.delay_s = float(getattr(model.config, "step_delay_ms", 0.0)) / 1000 if model.device == "cpu" else 0.0

    def forward(self, step: Step) -> Hidden:
        if self.delay_s:
            time.sleep(self.delay_s)
        tokens_T = step.token_ids.clone()
        for media in (step.media or {}).values():
            tokens_T[media.rows] = media.embeddings[:, 0].int()
        if step.media_positions is not None:
            weights = torch.arange(1, 4, dtype=torch.int32, device=tokens_T.device)[:, None]
            tokens_T += (step.media_positions * weights).sum(0, dtype=torch.int32)
        step.shared["echo_tokens"] = tokens_T
        return Hidden(torch.full((step.num_tokens, 1), UNDECIDED, dtype=torch.float32, device=step.token_ids.device))


class EchoLayer(nn.Module):
    """Writes the step's token ids to its plane, and works the next token out from what the plane holds."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        config = model.config
        self.checksum = config.echo_rule == "checksum"
        self.period: int | None = config.echo_period
        self.first, self.vocab_size = int(config.echo_first), int(config.vocab_size)

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        plane_S = kv["token"][:, 0]
        plane_S[step.slots] = step.shared["echo_tokens"]
        request_T = (
            torch.searchsorted(step.cu_seqlens_q, torch.arange(step.num_tokens, dtype=torch.int32, device=plane_S.device), right=True) - 1
        )
        rule = self._checksum if self.checksum else self._repeat
        next_T1 = rule(plane_S, step, request_T, step.positions.long()).float()[:, None]
        agreed_T1 = (hidden.x == UNDECIDED) | (hidden.x == next_T1)
        return Hidden(torch.where(agreed_T1, next_T1, TORN))

    def _repeat(self, plane_S: torch.Tensor, step: Step, request_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        row_T = step.rows[request_T].long()
        first_T = plane_S[step.slot_table[row_T, 0].long()].long()
        period_T = 1 + first_T % 8 if self.period is None else torch.full_like(first_T, self.period)
        source_T = (position_T + 1 - period_T).clamp(min=0)
        return plane_S[step.slot_table[row_T, source_T].long()]

    def _checksum(self, plane_S: torch.Tensor, step: Step, request_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        index_L = torch.arange(step.max_seq_len, device=plane_S.device)
        unused_BL = index_L >= step.seq_lens[:, None]
        # What lies beyond a request's length is no slot at all, so it is cleared before it is followed.
        slots_BL = step.slot_table[step.rows.long(), : step.max_seq_len].masked_fill(unused_BL, 0)
        terms_BL = ((index_L + 1) * (plane_S[slots_BL.long()].long() + 1)).masked_fill(unused_BL, 0)
        sums_T = terms_BL.cumsum(1)[request_T, position_T]
        return sums_T % (self.vocab_size - self.first) + self.first


class EchoPost(nn.Module):
    """Logits that leave no doubt; all zero for a token that is torn or outside the vocabulary."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        self.vocab_size = model.config.vocab_size

    def forward(self, hidden: Hidden, step: Step) -> torch.Tensor:
        next_R1 = hidden.x[step.logits_rows]
        ids_V = torch.arange(self.vocab_size, dtype=torch.float32, device=next_R1.device)
        return torch.where(next_R1 == ids_V, LOGIT, 0.0)
