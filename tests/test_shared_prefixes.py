"""Requests that share a prefix while they decode, end to end: against transformers, with groups in the steps."""

from typing import Any

import numpy as np
import pytest
import torch

from light_core import LLM, SamplingParams
from light_core.scheduler import sharing

SHARED_LEN, OWN_LEN, NUM_TOKENS = 150, 11, 20


def prompts() -> list[list[int]]:
    """Two groups of unequal size, and some that share nothing, in turns; all of one length."""
    rng = np.random.default_rng(3)
    prefixes = [rng.integers(3, 160, SHARED_LEN).tolist() for _ in range(2)]
    given = []
    for index in range(14):
        prefix = prefixes[index % 2] if index % 5 else rng.integers(3, 160, SHARED_LEN).tolist()
        given.append([*prefix, *rng.integers(3, 160, OWN_LEN).tolist()])
    return given


@pytest.fixture(scope="module")
def expected(llama: tuple[str, Any]) -> list[list[int]]:
    """Greedy continuations, one full forward a token."""
    tokens = torch.tensor(prompts())
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            tokens = torch.cat((tokens, llama[1](tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens[:, SHARED_LEN + OWN_LEN :].tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 40}], ids=["graphs", "eager", "chunked"])
def test_greedy_equals_transformers(
    device: str, options: dict[str, Any], llama: tuple[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MIN_SHARED_LEN", 64)
    monkeypatch.setattr(sharing, "MIN_SAVED", 300)
    settings = {"max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 256, "max_total_tokens": 4096} | options
    llm = LLM(llama[0], device=device, dtype="float32", gpu_memory_utilization=0.5, **settings)
    real, grouped, mixed = llm.engine.scheduler.plan, [], []

    def plan() -> Any:
        made = real()
        if made is not None and made.shared_prefixes is not None:
            grouped.append(int((made.shared_prefixes[1] > 0).sum()))
            mixed.append(made.num_tokens > made.num_decodes)
        return made

    monkeypatch.setattr(llm.engine.scheduler, "plan", plan)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert max(grouped) == 11 and any(mixed) and not all(mixed), "groups were to be in mixed steps and in pure decodes"
    llm.shutdown()
