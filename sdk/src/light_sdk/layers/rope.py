"""Rotary position embedding as numbers: what a configuration asks for, and the frequencies that follow.

Not here: the module that turns positions into cosines and sines (`rotary.py`). Everything is computed in float32 on
the CPU, whatever the model's dtype and device. Sources: RoFormer (arXiv 2104.09864), position interpolation
(arXiv 2306.15595), NTK-aware and dynamic scaling and YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), Llama 3.1
(`apply_scaling` of meta-llama/llama-models).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from light_core.errors import ModelError

__all__ = ["ROPE_TYPES", "RopeParameters"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ALIASES = {"su": "longrope"}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """One model's rotary embedding.

    Attributes:
        rope_type: one of `ROPE_TYPES`.
        theta: base of the frequencies.
        rotary_dim: leading dimensions of a head that are rotated; even.
        original_len: length the model was pretrained with, in tokens; scalings start from it.
        max_len: `max_position_embeddings` of the configuration.
        scaling: the remaining entries of the configuration's dictionary ("factor", "beta_fast", …).
    """

    rope_type: str
    theta: float
    rotary_dim: int
    original_len: int
    max_len: int
    scaling: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Any, head_dim: int) -> "RopeParameters":
        """Reads a transformers configuration, in any spelling.

        The dictionary may be called `rope_parameters` or `rope_scaling`, its kind `rope_type` or `type`; the base, the
        rotated share and the original length may stand in it or beside it.

        Args:
            config: object with `max_position_embeddings` and, where they are not the default, the rest.
            head_dim: of queries and keys.

        Raises:
            ModelError: an unknown kind, or an entry that is missing or out of range.
        """
        entries: dict[str, Any] = {}
        for spelling in ("rope_scaling", "rope_parameters"):
            entries.update(getattr(config, spelling, None) or {})
        kind = entries.get("rope_type") or entries.get("type") or "default"
        kind = _ALIASES.get(kind, kind)
        if kind not in ROPE_TYPES:
            raise ModelError(f"rope_type {kind!r} is not known", f"known: {', '.join(ROPE_TYPES)}", "choose a plugin that has it")
        if missing := [name for name in _REQUIRED.get(kind, ()) if entries.get(name) is None]:
            raise ModelError(f"rope_type {kind!r} lacks {', '.join(missing)}", f"it has {', '.join(sorted(entries))}", "mend config.json")
        theta = entries.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
        share = entries.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        rotary_dim, max_len = int(head_dim * share), int(config.max_position_embeddings)
        if rotary_dim < (4 if kind == "dynamic" else 2) or rotary_dim % 2 or rotary_dim > head_dim:
            raise ModelError(f"{rotary_dim} of {head_dim} dimensions cannot be rotated", "an even number is needed", "mend config.json")
        original = max_len
        if kind in ("yarn", "longrope", "llama3"):
            # A value beside the dictionary wins over one inside: Phi-3 files hold both and mean the outer one.
            outer = getattr(config, "original_max_position_embeddings", None)
            original = int(outer or entries.get("original_max_position_embeddings") or max_len)
        for name in ("short_factor", "long_factor") if kind == "longrope" else ():
            if len(entries[name]) != rotary_dim // 2:
                raise ModelError(
                    f"rope {name} has {len(entries[name])} entries", f"the rotated dimensions need {rotary_dim // 2}", "mend config.json"
                )
        return cls(kind, float(theta), rotary_dim, original, max_len, entries)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on its request's length beside its position."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def max_shared_len(self) -> int | None:
        """For `KVLayout.max_shared_len`: up to this length the rotation depends on the position alone."""
        return self.original_len if self.depends_on_length else None

    @property
    def factor(self) -> float:
        """How many times longer than pretrained the context is meant to be."""
        return float(self.scaling.get("factor") or self.max_len / self.original_len)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by, so that attention stays as sharp over longer contexts."""
        given = self.scaling.get("attention_factor")
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if given is not None:
            return float(given)
        if self.factor <= 1.0:
            return 1.0
        if self.rope_type == "longrope":
            return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_len))
        mscale, mscale_all_dim = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            return float((0.1 * mscale * math.log(self.factor) + 1.0) / (0.1 * mscale_all_dim * math.log(self.factor) + 1.0))
        return 0.1 * math.log(self.factor) + 1.0

    def exponents(self) -> torch.Tensor:
        """2i/d for each pair of dimensions i; float32 `[rotary_dim / 2]` on the CPU."""
        return torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim

    def inverse_frequencies(self, long: bool = False) -> torch.Tensor:
        """Radians per position of each pair of dimensions; float32 `[rotary_dim / 2]` on the CPU.

        Args:
            long: for longrope, those of requests beyond the original length. For dynamic, the result holds up to the
                original length; `dynamic_base` has the rest.
        """
        frequencies = 1.0 / self.theta ** self.exponents()
        if self.rope_type == "linear":
            return frequencies / self.factor
        if self.rope_type == "llama3":
            return self._llama3(frequencies)
        if self.rope_type == "yarn":
            return self._yarn(frequencies)
        if self.rope_type == "longrope":
            return frequencies / torch.tensor(self.scaling["long_factor" if long else "short_factor"], dtype=torch.float32, device="cpu")
        return frequencies

    def dynamic_base(self, lengths: torch.Tensor) -> torch.Tensor:
        """The base for requests of `lengths` tokens (any shape and device), float32: dynamic NTK scaling.

        base' = base * (s * L / L0 - (s - 1)) ** (d / (d - 2)), and base itself up to L0 (arXiv 2309.00071, section 3.3
        together with appendix A.1); written so that it is exact up to L0.
        """
        beyond = (lengths - self.original_len).clamp(min=0).float() / self.original_len
        stretch = 1.0 + self.factor * beyond
        return stretch ** (self.rotary_dim / (self.rotary_dim - 2)) * self.theta

    def _llama3(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Long wavelengths are interpolated, short ones kept, and those between blended."""
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        turns = self.original_len * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return keep * frequencies + (1.0 - keep) * frequencies / self.factor

    def _yarn(self, frequencies: torch.Tensor) -> torch.Tensor:
        """NTK by parts: dimensions that turn often are kept, those that turn seldom interpolated (section 3.2)."""

        def dimension(turns: float) -> float:
            """The pair of dimensions that makes `turns` full turns over the original length."""
            return self.rotary_dim * math.log(self.original_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = dimension(self.scaling.get("beta_fast") or 32), dimension(self.scaling.get("beta_slow") or 1)
        if self.scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.rotary_dim - 1)
        # A ramp of no length would divide by zero; the width only has to be less than one dimension.
        width = (last - first) or 0.001
        interpolated = ((torch.arange(self.rotary_dim // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0.0, 1.0)
        return interpolated * frequencies / self.factor + (1.0 - interpolated) * frequencies
