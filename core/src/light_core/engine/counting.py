"""Bytes and operations that a step cannot do without, counted from what the contract knows of a model: where its
parameters stand, its KV layout, and the facts that its ops were selected with. No family is known here.

What is counted:

    pre layer     tables of two dimensions or more give one row a token; other parameters are read whole
    layers        every parameter is read once a step; each matrix multiplies every token, but in a last layer that
                  narrows (`Layer`) the wanted ones alone: nothing tells which matrices make the others' keys and values
    experts       parameters of a module's `experts`, where it says `num_experts` and `top_k` (see `Layer`): of each layer
                  only the experts that some token is expected to choose, choices taken as uniform and independent
    post layer    read once; its matrices multiply the wanted rows alone
    KV            each request's keys and values read once a layer, as far back as the layer's window; each token's written
    attention     products of a query with its keys and values, where an op's facts say `num_heads`, and `head_dim` or
                  `kv_width`, of a head's key and value together

Activations are not counted: a perfect machine keeps them on the chip. Media encoders run outside of the step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from light_core.engine.wanted import narrows
from light_core.kv.layout import DTYPE_BYTES, bytes_per_token
from light_core.ops import Choice
from light_core.plugins import ModelRuntime
from light_core.types import KVLayout

if TYPE_CHECKING:
    import torch

__all__ = ["Needs", "StepCount", "count_step", "floor_ms"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What one part of a step moves and computes.

    Attributes:
        num_bytes: read and written.
        num_flops: multiplications and additions of matrix products.
    """

    num_bytes: float = 0.0
    num_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class StepCount:
    """What one step needs.

    Attributes:
        embedding: rows of the pre layer's tables, and its other parameters.
        layers: parameters of the layers, without experts.
        experts: parameters of the experts that are chosen.
        head: the post layer.
        attention: KV read, KV written, and products with keys and values.
        is_attention_counted: whether `attention` has its products; no op said how many heads there are, else.
        are_experts_known: False where an op chooses experts and no module said which parameters are theirs; `layers` has
            all of them then, as if every token met every expert.
    """

    embedding: Needs
    layers: Needs
    experts: Needs
    head: Needs
    attention: Needs
    is_attention_counted: bool
    are_experts_known: bool

    @property
    def parts(self) -> dict[str, Needs]:
        """Part to its needs."""
        return {name: getattr(self, name) for name in ("embedding", "layers", "experts", "head", "attention")}


def count_step(runtime: ModelRuntime, query_lens: Sequence[int], seq_lens: Sequence[int], num_rows: int) -> StepCount:
    """What a step needs at least.

    Args:
        runtime: the bound model.
        query_lens: tokens that each request has in the step.
        seq_lens: tokens that each has in KV after it.
        num_rows: rows whose logits are wanted.
    """
    num_tokens, choices = sum(query_lens), runtime.choices
    last = len(runtime.layers) - 1
    # One at least: where no token is wanted, one stands in. A chunk that ends no prompt comes behind the other requests.
    num_wanted = min(num_tokens, max(num_rows, 1)) if narrows(runtime) else num_tokens
    wanted = (last, num_wanted) if num_wanted < num_tokens else None
    layers, experts = Needs(), Needs()
    for layer_id, layer in enumerate(runtime.layers):
        own, chosen = _layer(layer, num_wanted if layer_id == last else num_tokens)
        layers, experts = _add(layers, own), _add(experts, chosen)
    head, _ = _layer(runtime.post, num_rows)
    attention, is_counted = _attention(runtime.kv_layout, choices, query_lens, seq_lens, wanted)
    are_known = experts.num_bytes > 0 or not any({"num_experts", "top_k"} <= choice.facts.keys() for choice in choices)
    return StepCount(_embedding(_parameters(runtime.pre), num_tokens), layers, experts, head, attention, is_counted, are_known)


def floor_ms(count: StepCount, bytes_per_s: float, flops_per_s: float) -> dict[str, float]:
    """Least time of each part, in milliseconds: the longer of moving its bytes and computing its products, as if both
    went on at the same time. The parts follow one another, so that the step's floor is their sum."""
    return {name: 1e3 * max(need.num_bytes / bytes_per_s, need.num_flops / flops_per_s) for name, need in count.parts.items()}


def _parameters(module: Any) -> "list[torch.Tensor]":
    return list(module.parameters())


def _add(a: Needs, b: Needs) -> Needs:
    return Needs(a.num_bytes + b.num_bytes, a.num_flops + b.num_flops)


def _embedding(parameters: "Iterable[torch.Tensor]", num_tokens: int) -> Needs:
    num_bytes = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        num_bytes += _num_bytes(parameter) * min(num_tokens, rows) // rows
    return Needs(num_bytes)


def _num_bytes(parameter: "torch.Tensor") -> int:
    return parameter.numel() * parameter.element_size()  # `nbytes` is not for opaque layouts


def _layer(module: Any, num_rows: int) -> tuple[Needs, Needs]:
    """Needs of a module that meets `num_rows` tokens: of parameters that every token meets, and of those of experts."""
    own, experts, shares = Needs(), Needs(), _shares(module)
    for parameter in _parameters(module):
        share = shares.get(id(parameter))
        num_flops = 2.0 * num_rows * parameter.numel() if parameter.dim() > 1 else 0.0
        if share is None:
            own = _add(own, Needs(_num_bytes(parameter), num_flops))
        else:
            touched = 1.0 - (1.0 - share) ** num_rows
            experts = _add(experts, Needs(touched * _num_bytes(parameter), share * num_flops))
    return own, experts


def _shares(module: Any) -> dict[int, float]:
    """By the identity of each parameter of experts in `module`, the share of it that one token meets."""
    shares: dict[int, float] = {}
    for block in module.modules():
        experts, num_experts, top_k = (getattr(block, name, None) for name in ("experts", "num_experts", "top_k"))
        if hasattr(experts, "parameters") and isinstance(num_experts, int) and isinstance(top_k, int):
            shares |= {id(parameter): top_k / num_experts for parameter in _parameters(experts)}
    return shares


def _attention(
    layout: KVLayout, choices: Iterable[Choice], query_lens: Sequence[int], seq_lens: Sequence[int], wanted: tuple[int, int] | None
) -> tuple[Needs, bool]:
    """`wanted` is a layer, and of how many requests the last token alone attends there; None where all tokens do in all."""
    facts = [choice.facts for choice in choices if _head_width(choice.facts) is not None]
    num_bytes, num_flops, is_counted = float(sum(query_lens) * bytes_per_token(layout)), 0.0, True
    for group in layout.groups:
        width = sum(math.prod(plane.shape) * DTYPE_BYTES[plane.dtype] for plane in group.planes)
        if width == 0:
            continue
        narrowed = 1 if wanted is not None and wanted[0] in group.layers else 0
        whole = list(zip(query_lens, seq_lens))
        # Number of layers, and of their requests how many queries and how many keys each has.
        parts = [(len(group.layers) - narrowed, whole)]
        if wanted is not None and narrowed:
            parts.append((1, [(1, length) for length in seq_lens[: wanted[1]]]))
        for num_layers, requests in parts:
            num_bytes += float(num_layers * width * sum(_tokens_read(query, length, group.window) for query, length in requests))
        # Where layers with and without a window have ops of their own, the one of this group's.
        uses = next((one for one in facts if one.get("window") == group.window), facts[0] if facts else None)
        if uses is None:
            is_counted = False
            continue
        pairs = sum(num_layers * _pairs(query, length, group.window) for num_layers, requests in parts for query, length in requests)
        num_flops += 2.0 * uses["num_heads"] * (_head_width(uses) or 0) * pairs
    return Needs(num_bytes, num_flops), is_counted


def _head_width(facts: Mapping[str, Any]) -> int | None:
    """Width of a head's key and value together, if these are the facts of attention."""
    width = facts.get("kv_width", 2 * facts.get("head_dim", 0))
    return int(width) if width and "num_heads" in facts else None


def _tokens_read(query_len: int, seq_len: int, window: int | None) -> int:
    """Positions that `query_len` last tokens of a request of `seq_len` see together."""
    return seq_len if window is None else min(seq_len, query_len + window - 1)


def _pairs(query_len: int, seq_len: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: the query at position p sees min(p + 1, window) keys."""
    first = seq_len - query_len
    if window is None or seq_len <= window:
        return query_len * first + query_len * (query_len + 1) // 2
    growing = max(0, min(window - first, query_len))  # queries that see fewer keys than the window has, or just all
    return growing * first + growing * (growing + 1) // 2 + (query_len - growing) * window
