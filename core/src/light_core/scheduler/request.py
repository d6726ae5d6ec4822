"""A request as the scheduler keeps it, and its limits checked. Caller: the scheduler."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from light_core.engine.requests import EngineRequest
from light_core.errors import RequestError
from light_core.kv.radix import Node

__all__ = ["ScheduledRequest", "max_output_len"]


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """What the scheduler knows of one request beside its row.

    Attributes:
        request: as it came in.
        arrival: order of arrival.
        max_tokens: output tokens it may have.
        row: its row, or -1 while it waits.
        outputs: output tokens before it was last preempted; while it runs, later ones are in its row.
        in_flight: samples planned before it was preempted whose ids have not come back. It waits for them.
        num_cached_tokens: prompt tokens that were found in the prefix cache.
        num_prompt_logprobs: prompt tokens whose successors' logprobs have been planned.
        node: end of its path in the prefix tree, locked while it has a row; None without prefix cache.
        finish_reason: set when it has ended.
        added_s: when it came, by the scheduler's clock.
        scheduled_s: when it was first admitted, by the same; None until then.
    """

    request: EngineRequest
    arrival: int
    max_tokens: int
    row: int = -1
    outputs: list[int] = field(default_factory=list)
    in_flight: int = 0
    num_cached_tokens: int = 0
    num_prompt_logprobs: int = 0
    node: Node | None = None
    finish_reason: str | None = None
    added_s: float = 0.0
    scheduled_s: float | None = None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of its prompt tokens are wanted, so that none of them may come from the cache."""
        return self.request.params.prompt_logprobs is not None

    @property
    def exact(self) -> bool:
        """Whether nothing but its length can end it."""
        return not self.request.stop_token_ids and not self.request.params.stop_strings

    @property
    def max_left(self) -> int:
        """Output tokens that it may have yet, while it waits."""
        return self.max_tokens - len(self.outputs)

    @property
    def max_len(self) -> int:
        """Tokens of its prompt, and of all the output that it may have."""
        return len(self.request.prompt) + self.max_tokens

    def known_tokens(self) -> npt.NDArray[np.int32]:
        """Prompt and `outputs`, int32."""
        if not self.outputs:
            return self.request.prompt
        return np.concatenate([self.request.prompt, np.array(self.outputs, dtype=np.int32)])


def max_output_len(request: EngineRequest, max_model_len: int, capacity: int) -> int:
    """How many tokens `request` may generate.

    Args:
        request: to be served.
        max_model_len: prompt and output together.
        capacity: slots of the KV pool.

    Returns:
        Its `max_tokens`; where that is None, as many as the model's length and the pool allow.

    Raises:
        RequestError: the prompt is empty or leaves no room, or `max_tokens` is more than there is room for.
    """
    prompt_len, wanted = len(request.prompt), request.params.max_tokens
    if prompt_len == 0:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    bound, name = min((max_model_len, "max_model_len"), (capacity, "KV pool tokens"))
    room = bound - prompt_len
    if room < 1:
        raise RequestError(f"prompt of {prompt_len} tokens leaves no room for output: {name} is {bound}; use <= {bound - 1}", "prompt")
    if wanted is None:
        return room
    if wanted > room:
        raise RequestError(f"max_tokens {wanted} + prompt {prompt_len} > {name} {bound}; use <= {room}", "max_tokens")
    return wanted
