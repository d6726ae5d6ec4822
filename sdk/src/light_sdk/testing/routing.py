"""Tiny random models with experts whose choices do not hang on rounding.

In a model with random weights the last expert that is chosen and the first that is not are often so close that bfloat16
changes places, in transformers at one token and in Light at another. One such token is off by more than rounding explains,
and comparing bfloat16 with float32 says nothing any more. `settle_routing` changes routers until that does not happen.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["settle_routing"]

STD = 0.25
MARGIN = 1.5
"""An error that must not change a choice, in multiples of what bfloat16 does to the same token's hidden state."""
TRIALS = 4
STEPS = (0.3, 0.1, 0.03)
MAX_DRAWS = 20000


def settle_routing(model: Any, prompts: Sequence[Sequence[int]], seed: int = 0) -> Any:
    """Draws the weight of each router of `model` anew and changes it step by step, at random, until no token of `prompts` is
    close to another choice.

    Args:
        model: of transformers; its routers are the modules whose class is called "…TopKRouter", have a `weight` and answer
            `(logits, weights, ids)`. Overwritten.
        prompts: token ids.
        seed: of the draws.

    Returns:
        `model`.

    Raises:
        ValueError: it has no router, or experts are too many for such a weight to be found.
    """
    generator = torch.Generator().manual_seed(seed)
    routers = [name for name, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router")
    with torch.no_grad():
        for name in routers:
            # From the first layer to the last: what a router is given depends on those before it.
            hidden, rounded = _inputs(model, name, prompts), _inputs(copy.deepcopy(model).bfloat16(), name, prompts)
            error = MARGIN * (rounded.float() - hidden)
            size = error.square().mean(-1, keepdim=True).sqrt()
            shifted = [hidden + size * torch.randn(hidden.shape, generator=generator) for _ in range(TRIALS)]
            shifted += [hidden + error, hidden - error, rounded]
            router = model.get_submodule(name)
            # Values that bfloat16 has, so that it does not change them.
            router.weight.normal_(0.0, STD, generator=generator).copy_(router.weight.bfloat16())
            best, fewest = router.weight.clone(), _unsettled(router, hidden, shifted)
            for i in range(MAX_DRAWS):
                if not fewest:
                    break
                step = STEPS[i % len(STEPS)]
                # A step that keeps the weight's spread.
                draw = torch.randn(best.shape, generator=generator)
                router.weight.copy_((best * (1 - step**2) ** 0.5 + draw * (step * STD)).bfloat16())
                count = _unsettled(router, hidden, shifted)
                if count <= fewest:
                    best, fewest = router.weight.clone(), count
            if fewest:
                raise ValueError(f"no router keeps its choices for {len(hidden)} tokens: use fewer experts or tokens")
            router.weight.copy_(best)
    return model


def _inputs(model: Any, router: str, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """What the module `router` is given for all tokens of `prompts`, `[T, E]`."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(router).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].flatten(0, -2)))
    for prompt in prompts:
        model(input_ids=torch.tensor([list(prompt)]))
    handle.remove()
    return torch.cat(seen)


def _unsettled(router: Any, hidden: torch.Tensor, shifted: Sequence[torch.Tensor]) -> int:
    """How many tokens have other experts when they are shifted; what is in bfloat16 goes through a router in bfloat16."""
    chosen = _choice(router, hidden)
    found = (_choice(copy.deepcopy(router).bfloat16() if moved.dtype == torch.bfloat16 else router, moved) for moved in shifted)
    return int(torch.stack([(ids != chosen).any(-1) for ids in found]).any(0).sum())


def _choice(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Experts of each token, in ascending order."""
    ids: torch.Tensor = router(hidden)[2]
    return ids.sort(dim=-1).values
