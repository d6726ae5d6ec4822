"""The offline API against transformers: greedy tokens, logprobs, and every way a step can be cut."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from light_core import LLM, LightError, SamplingParams
from light_core.errors import RequestError
from light_core.plugins import count_hook_calls

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def engine(folder: str, **options: Any) -> LLM:
    return LLM(folder, device="cpu", dtype="float32", **({"max_model_len": 256, "max_num_seqs": 16} | options))


def prompts(count: int, seed: int = 0, low: int = 3, high: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 160, int(rng.integers(low, high))).tolist() for _ in range(count)]


def reference(model: Any, prompt: list[int], length: int) -> list[int]:
    """Greedy continuation by transformers, without its cache: one full forward a token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def run(llm: LLM, given: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(tiny: tuple[str, Any]) -> list[list[int]]:
    return [reference(tiny[1], prompt, 24) for prompt in prompts(6)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"enable_prefix_caching": False},
        {"max_total_tokens": 128, "max_model_len": 128},
        {"async_planning": True},
        {"async_planning": True, "max_total_tokens": 128, "max_model_len": 128, "max_num_batched_tokens": 16},
    ],
    ids=["plain", "chunked", "uncached", "preempted", "ahead", "ahead-preempted-chunked"],
)
def test_greedy_equals_transformers(tiny: tuple[str, Any], expected: list[list[int]], options: dict[str, Any]) -> None:
    llm = engine(tiny[0], **options)
    assert run(llm, prompts(6)) == expected
    assert run(llm, prompts(6)) == expected, "a second time, out of the prefix cache"
    stats = llm.engine.stats()
    assert stats.kv_slots_used == 0 and stats.num_requests_running == stats.num_requests_waiting == 0
    if options.get("max_total_tokens") and not options.get("async_planning"):
        assert stats.steps > 0


def test_shared_prefix_is_computed_once(llama: tuple[str, Any]) -> None:
    llm = engine(llama[0], max_num_batched_tokens=512)
    prefix = prompts(1, seed=5, low=100, high=101)[0]
    given = [prefix + tail for tail in prompts(8, seed=6, low=4, high=9)]
    assert run(llm, given) == [reference(llama[1], prompt, 24) for prompt in given]
    assert llm.engine.stats().prefix_cache_hits == 7 * len(prefix), "seven of eight that arrive together find it"


@pytest.fixture(scope="module")
def llm(llama: tuple[str, Any]) -> Iterator[LLM]:
    made = engine(llama[0])
    yield made
    made.shutdown()


def test_logprobs_equal_transformers(llm: LLM, llama: tuple[str, Any]) -> None:
    prompt = prompts(1, seed=9)[0]
    params = GREEDY.replace(max_tokens=5, logprobs=3, prompt_logprobs=2)
    result = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    output = result.outputs[0]
    with torch.inference_mode():
        rows = llama[1](torch.tensor([prompt + output.token_ids])).logits[0].log_softmax(-1)
    assert result.prompt_logprobs is not None and output.logprobs is not None
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(prompt)
    entries = [*result.prompt_logprobs[1:], *output.logprobs]
    for position, (entry, token) in enumerate(zip(entries, (prompt + output.token_ids)[1:], strict=True)):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(rows[position, token]), abs=1e-4)
        assert entry.rank == 1 + int((rows[position] > rows[position, token]).sum())
        best = rows[position].topk(len(entry.top))
        assert [token for token, _ in entry.top] == best.indices.tolist()


def test_prompt_of_one_token_with_prompt_logprobs(llm: LLM) -> None:
    result = llm.generate({"prompt_token_ids": [7]}, GREEDY.replace(max_tokens=2, prompt_logprobs=1), use_tqdm=False)[0]
    assert result.prompt_logprobs == [None]


def test_n_and_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=11, max_tokens=12, ignore_eos=True)
    prompt = {"prompt_token_ids": prompts(1)[0]}
    first = [output.token_ids for output in llm.generate(prompt, params, use_tqdm=False)[0].outputs]
    among = llm.generate([prompt, *({"prompt_token_ids": other} for other in prompts(5, seed=3))], params, use_tqdm=False)[0]
    assert [output.token_ids for output in among.outputs] == first, "a seed reproduces, whatever the neighbours"
    assert len({tuple(tokens) for tokens in first}) == 4, "n outputs differ"


def test_stop_strings_tokens_and_lengths(llm: LLM) -> None:
    prompt = {"prompt_token_ids": prompts(1)[0]}
    free = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0]
    words = free.text.split()
    target = next(index for index in range(3, len(words)) if words.index(words[index]) == index)
    stopped = llm.generate(prompt, GREEDY.replace(stop=[f"{words[target - 1]} {words[target]}"]), use_tqdm=False)[0].outputs[0]
    assert stopped.text.split() == words[: target - 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", f"{words[target - 1]} {words[target]}")
    token = free.token_ids[target]
    ended = llm.generate(prompt, GREEDY.replace(stop_token_ids=[token]), use_tqdm=False)[0].outputs[0]
    assert ended.token_ids == free.token_ids[: target + 1] and ended.stop_reason == token
    assert ended.text.split() == words[:target], "the stop token is not in the text"
    assert free.finish_reason == "length" and len(free.token_ids) == 24


def test_end_of_sequence_ends_unless_ignored(llm: LLM) -> None:
    prompt = {"prompt_token_ids": prompts(1)[0]}
    bias = GREEDY.replace(logit_bias={2: 100.0}, ignore_eos=False)
    ended = llm.generate(prompt, bias, use_tqdm=False)[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.text) == ([2], "stop", "")
    later = llm.generate(prompt, bias.replace(min_tokens=5), use_tqdm=False)[0].outputs[0]
    assert len(later.token_ids) == 6 and 2 not in later.token_ids[:5]
    ignored = llm.generate(prompt, bias.replace(ignore_eos=True), use_tqdm=False)[0].outputs[0]
    assert ignored.token_ids == [2] * 24


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ({"prompt_token_ids": []}, GREEDY, "at least one token"),
        ({"prompt_token_ids": [160]}, GREEDY, "0 to 159"),
        ({"prompt_token_ids": [-1]}, GREEDY, "0 to 159"),
        ({"prompt_token_ids": [5] * 300}, GREEDY, "256"),
        ({"prompt_token_ids": [5] * 250}, GREEDY, "max_tokens 24 + prompt 250 > max_model_len 256; use <= 6"),
        ({"prompt_token_ids": [5]}, GREEDY.replace(allowed_token_ids=[500]), "500"),
        ({}, GREEDY, "prompt_token_ids"),
    ],
)
def test_bad_requests_are_refused_and_cost_nothing(llm: LLM, prompt: dict[str, Any], params: SamplingParams, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([{"prompt_token_ids": [4, 5]}, prompt], params, use_tqdm=False)
    assert words in str(caught.value)
    stats = llm.engine.stats()
    assert stats.num_requests_running == stats.num_requests_waiting == stats.kv_slots_used == 0
    assert len(run(llm, [[4, 5]])[0]) == 24, "and it goes on"


def test_chat_renders_the_template(llm: LLM) -> None:
    result = llm.chat([{"role": "user", "content": "w5 w6"}], GREEDY, use_tqdm=False)[0]
    assert result.prompt_token_ids[-2:] == [5, 6]


def test_no_hook_is_called_in_a_step(llama: tuple[str, Any]) -> None:
    made = engine(llama[0])
    with count_hook_calls(made.engine.resolved.plugins) as calls:
        run(made, prompts(8), GREEDY.replace(max_tokens=100))
    assert made.engine.stats().steps >= 100
    assert sum(calls.values()) == 0


def test_two_engines_in_one_process(llama: tuple[str, Any]) -> None:
    one, two = engine(llama[0]), engine(llama[0], max_num_batched_tokens=9, max_num_seqs=3)
    assert run(one, prompts(3)) == run(two, prompts(3))


def test_a_model_that_does_not_fit_says_so(llama: tuple[str, Any]) -> None:
    with pytest.raises(LightError) as caught:
        engine(llama[0], max_total_tokens=10)
    assert "--max-model-len 10" in caught.value.block()
