"""The layers of a step, the last of them for the tokens alone whose logits are wanted.

A prompt's tokens need the last layer for its keys and values only; what it makes of their hidden states nobody reads, but for
the one that a token is sampled after. So the last layer writes KV for all and goes on with the wanted ones, each of them a
decode of its request, and the post layer sees no others: of the last layer of a prefill step remain the product for queries,
keys and values. Not in steps whose prompt tokens' logprobs are wanted too; decodes are all wanted. The runner calls it, and
the driver of the conformance tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from light_core.engine.pieces import run_layers
from light_core.plugins import ModelRuntime
from light_core.types import Hidden, KVView, Step

__all__ = ["hidden_states", "narrows", "wanted_step"]


def narrows(runtime: ModelRuntime) -> bool:
    """Whether the model's last layer says of itself that it does as `Layer` has it for `Step.wanted`."""
    return bool(getattr(runtime.layers[-1], "narrows", False))


def wanted_step(step: Step, requests: torch.Tensor) -> Step:
    """The tokens `step.logits_rows` as a step of their own, all of them decodes. At least one is wanted.

    Args:
        step: each of the wanted tokens is the last of its request in it; decodes are all wanted and come first.
        requests: int64 [R], index in B of each wanted token's request.
    """
    tokens, count = step.logits_rows, requests.shape[0]
    arange = torch.arange(count + 1, dtype=torch.int32, device=tokens.device)
    return replace(
        step,
        token_ids=step.token_ids.index_select(0, tokens),
        positions=step.positions.index_select(0, tokens),
        context_lens=step.context_lens.index_select(0, tokens),
        slots=step.slots.index_select(0, tokens),
        cu_seqlens_q=arange,
        seq_lens=step.seq_lens.index_select(0, requests),
        rows=step.rows.index_select(0, requests),
        logits_rows=arange[:count].long(),
        num_decodes=count,
        max_query_len=1,
        prefill_lens=(),
        prompt_lens=None if step.prompt_lens is None else step.prompt_lens.index_select(0, requests),
        shared_prefixes=None if step.shared_prefixes is None else _more_places(step.shared_prefixes, arange[:count]),
        media=None,
        media_positions=None if step.media_positions is None else step.media_positions.index_select(1, tokens),
        shared={},
    )


def _more_places(places: torch.Tensor, decodes: torch.Tensor) -> torch.Tensor:
    """`Step.shared_prefixes` for the decodes 0, 1, …; those that it lacks share nothing."""
    alone = decodes[places.shape[1] :]
    return torch.cat((places, torch.stack((alone, torch.zeros_like(alone), torch.zeros_like(alone)))), dim=1)


def hidden_states(
    runtime: ModelRuntime,
    kv: Sequence[KVView],
    step: Step,
    wanted: Step | None = None,
    most_layers: Callable[[Hidden, Step], Hidden] | None = None,
) -> Hidden:
    """What the model makes of `step`, up to its post layer: of all its tokens, or with `wanted` (see `wanted_step`) of those.

    Args:
        runtime: the model.
        kv: planes of its layers.
        step: the step.
        wanted: what the last layer goes on with.
        most_layers: does what all layers but the last do; None calls them.
    """
    hidden = runtime.pre(step)
    hidden = run_layers(runtime, kv, hidden, step) if most_layers is None else most_layers(hidden, step)
    return runtime.layers[-1](hidden, step if wanted is None else replace(step, wanted=wanted), kv[-1])
