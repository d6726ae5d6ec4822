"""A real model's steps: served prompts run in paces beside decodes, offline ones and those that nobody waits for do not, and
however a prompt is cut, greedy outputs are transformers'."""

from typing import Any

import numpy as np
import pytest
import torch

from light_core.config import EngineConfig
from light_core.engine.engine import Engine
from light_core.engine.pace import CPU_PACE
from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams

OUTPUT_LEN = 12


@pytest.mark.parametrize("paced", [False, True], ids=["served", "offline"])
def test_prompts_beside_decodes(llama: tuple[str, Any], paced: bool) -> None:
    folder, model = llama
    settings: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 4, "skip_tokenizer_init": True}
    engine = Engine(EngineConfig(model=folder, device="cpu", dtype="float32", **settings), paced=paced)
    plan, sizes = engine.scheduler.plan, []

    def watched() -> Any:
        step = plan()
        if step is not None:
            sizes.append((step.num_decodes, step.num_tokens))
        return step

    engine.scheduler.plan = watched  # type: ignore[method-assign]
    vocabulary = model.config.vocab_size
    prompts = [np.random.default_rng(index).integers(3, vocabulary, size, dtype=np.int32) for index, size in enumerate((150, 240))]
    outputs: dict[int, list[int]] = {0: [], 1: []}
    params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0.0, ignore_eos=True)
    for request_id, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id, prompt, params, frozenset()))
        for update in engine.step() + engine.step():
            outputs[update.request_id] += update.token_ids
    while engine.has_work():
        for update in engine.step():
            outputs[update.request_id] += update.token_ids
    assert sizes[0] == (0, 150), "nobody waits"
    beside = [total for decodes, total in sizes if 0 < decodes < total]
    assert beside == ([241] if paced else [CPU_PACE, 240 - (CPU_PACE - 1) + 1])
    for request_id, prompt in enumerate(prompts):
        tokens = prompt.tolist() + outputs[request_id]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0]
        assert logits.argmax(-1).tolist()[len(prompt) - 1 : -1] == outputs[request_id] and len(outputs[request_id]) == OUTPUT_LEN
