"""The offline API against transformers: greedy tokens, logprobs, and every way a step can be cut."""

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from light_core import LLM, LightError, SamplingParams
from light_core.config import EngineConfig
from light_core.engine.loading import bind_model, resolve_model
from light_core.engine.pieces import run_by_tokens
from light_core.engine.requests import EngineRequest
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
    assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    """Nobody holds a slot, a row or a place in the queue, and the bookkeeping agrees with itself."""
    engine, stats = llm.engine, llm.engine.stats()
    assert stats.kv_slots_used == 0 and stats.num_requests_running == stats.num_requests_waiting == 0
    assert not engine.has_work() and not engine._prompt_logprobs and not engine._prompt_told
    engine.scheduler.pool.check()
    if engine.scheduler.tree is not None:
        engine.scheduler.tree.check()


def test_preempted_greedy_equals_transformers(tiny: tuple[str, Any], expected: list[list[int]]) -> None:
    small = engine(tiny[0], max_total_tokens=96, max_model_len=96, max_num_seqs=8, max_num_batched_tokens=24)
    expect_little(small)
    # Who ignores the end is known to be as long as it may be.
    found = run(small, prompts(6), GREEDY.replace(ignore_eos=False))
    ends = [tokens.index(2) + 1 if 2 in tokens else len(tokens) for tokens in expected]
    assert found == [tokens[:end] for tokens, end in zip(expected, ends, strict=True)]
    assert small.engine.stats().preemptions > 0
    assert_idle(small)


def expect_little(llm: LLM) -> None:
    """Outputs of one token teach the scheduler to expect little, so that it admits too many of those that come then."""
    run(llm, [[5]] * 64, SamplingParams(allowed_token_ids=[9], stop_token_ids=[9]))


WAYS = {
    "plain": {},
    "ahead": {"async_planning": True},
    "uncached": {"enable_prefix_caching": False},
    "ahead-uncached": {"async_planning": True, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logprobs=1),
        SamplingParams(temperature=1.2, seed=3, n=2, frequency_penalty=0.2, min_tokens=5, prompt_logprobs=1),
        SamplingParams(temperature=1.2, seed=3, n=2, top_k=60, top_p=0.95, min_p=0.001, stop=["9 w1", "77 "]),
    ],
    ids=["penalties", "seeded-prompt-logprobs", "filters-stop"],
)
def test_preempted_requests_say_what_they_would_have_said(llama: tuple[str, Any], params: SamplingParams, options: dict[str, Any]) -> None:
    params = params.replace(max_tokens=60, banned_token_ids=[2])
    small = engine(llama[0], max_total_tokens=128, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=24, **options)
    expect_little(small)
    given = [{"prompt_token_ids": prompt} for prompt in prompts(12, seed=7, high=30)]
    found = small.generate(given, params, use_tqdm=False)
    assert small.engine.stats().preemptions > 2
    assert_idle(small)
    for mine, other in zip(found, engine(llama[0], max_num_batched_tokens=512).generate(given, params, use_tqdm=False), strict=True):
        for one, two in zip(mine.outputs, other.outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (two.token_ids, two.text, two.finish_reason)
            assert params.logprobs is None or len(one.logprobs or ()) == len(one.token_ids)
        assert params.prompt_logprobs is None or [entry and pytest.approx(entry.logprob, abs=1e-4) for entry in mine.prompt_logprobs] == [
            entry and entry.logprob for entry in other.prompt_logprobs
        ]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_aborts_at_any_moment(llama: tuple[str, Any], options: dict[str, Any]) -> None:
    made = engine(llama[0], max_total_tokens=128, max_model_len=128, max_num_seqs=6, max_num_batched_tokens=16, **options)
    rng, live, request_id = np.random.default_rng(3), set(), 0
    for _ in range(150):
        while len(live) < 10:
            params = SamplingParams(temperature=0.0, max_tokens=int(rng.integers(1, 60)), prompt_logprobs=1 if rng.random() < 0.4 else None)
            prompt = rng.integers(3, 150, int(rng.integers(1, 60))).astype(np.int32)
            made.engine.add(EngineRequest(request_id, prompt, params, frozenset({2})))
            live.add(request_id)
            request_id += 1
        if rng.random() < 0.4:
            gone = sorted(live)[int(rng.integers(len(live)))]
            made.engine.abort(gone)
            live.discard(gone)
        for update in made.engine.step():
            assert update.request_id in live
            if update.finish_reason is not None:
                live.discard(update.request_id)
    for gone in live:
        made.engine.abort(gone)
    made.engine.drain()
    assert_idle(made)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_logits_that_are_not_finite_end_their_request_alone(poisoned: str, llm: LLM, options: dict[str, Any]) -> None:
    made = engine(poisoned, max_num_batched_tokens=16, **options)
    shared = [token for token in prompts(1, seed=4, low=40, high=41)[0] if token != 77]
    healthy = [shared, [11, 12, 13]]
    given = [healthy[0], [*shared, 77, 3], [9, 77], healthy[1]]
    params = GREEDY.replace(banned_token_ids=[77])
    for _ in range(2):
        results = made.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
        ended = [result.outputs[0] for result in results]
        assert [output.finish_reason for output in ended] == ["length", "error", "error", "length"]
        assert ended[1].error and not ended[1].token_ids and ended[0].error is None
        assert [ended[0].token_ids, ended[3].token_ids] == run(llm, healthy, params)
        assert_idle(made)
    later = made.generate({"prompt_token_ids": [5, 6]}, GREEDY.replace(allowed_token_ids=[77]), use_tqdm=False)[0].outputs[0]
    assert (later.token_ids, later.finish_reason) == ([77], "error"), "the token came before its own logits"
    assert made.engine.stats().finished == {"length": 4, "error": 5}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_no_memory_for_penalties_ends_that_request_alone(
    llama: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    made = engine(llama[0], **options)
    real = torch.full

    def full(shape: Any, *rest: Any, **named: Any) -> torch.Tensor:
        if len(shape) == 2 and shape[1] == made.engine.vocab_size:  # the pool of token counts grows
            raise torch.OutOfMemoryError("no memory")
        return real(shape, *rest, **named)

    monkeypatch.setattr(torch, "full", full)
    params = [GREEDY, GREEDY.replace(presence_penalty=1.0), GREEDY]
    found = made.generate([{"prompt_token_ids": prompt} for prompt in prompts(3)], params, use_tqdm=False)
    assert [one.outputs[0].finish_reason for one in found] == ["length", "error", "length"]
    assert "token counts" in str(found[1].outputs[0].error)
    assert_idle(made)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("failing_step", [1, 4])
@pytest.mark.parametrize("error", [RuntimeError("a layer broke"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_generates_again_after_a_step_that_failed(
    llama: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, failing_step: int, options: dict[str, Any]
) -> None:
    made = engine(llama[0], max_num_batched_tokens=24, **options)
    real, calls = made.engine.runner._hidden, []

    def broken(step: Any, wanted: Any) -> Any:
        calls.append(step)
        if len(calls) == failing_step:
            raise error
        return real(step, wanted)

    monkeypatch.setattr(made.engine.runner, "_hidden", broken)
    with pytest.raises(type(error)):
        run(made, prompts(6))
    assert_idle(made)
    assert run(made, prompts(6)) == run(engine(llama[0]), prompts(6))
    assert_idle(made)


def test_interrupt_comes_between_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ended = llm.engine.runner._hidden, []

    def interrupted(step: Any, wanted: Any) -> Any:
        if not ended:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the interpreter runs signal handlers between instructions
        ended.append(real(step, wanted))
        return ended[-1]

    monkeypatch.setattr(llm.engine.runner, "_hidden", interrupted)
    # A program that a shell put in the background begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(llm, prompts(2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == 1, "the step ran to its end, and no other began"
    assert_idle(llm)
    assert len(run(llm, prompts(1))[0]) == 24


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


def test_those_that_may_run_longest_begin_first(llama: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(llama[0], max_num_seqs=1)
    step, ended = llm.engine.step, []

    def noted() -> Any:
        updates = step()
        ended.extend(update.request_id for update in updates if update.finish_reason is not None)
        return updates

    monkeypatch.setattr(llm.engine, "step", noted)
    lengths = [2, 9, 5, 9, 2]
    given = prompts(5, seed=4)
    params = [GREEDY.replace(max_tokens=length) for length in lengths]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
    assert [index - min(ended) for index in ended] == [1, 3, 2, 0, 4], "and otherwise in the order given"
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.prompt_token_ids for output in outputs] == given, "the results come in the order of the prompts"


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


def test_the_tokenizer_may_name_an_end_of_its_own(llama: tuple[str, Any], tmp_path: Path) -> None:
    """As chat models are published whose config.json still has the end of their base model."""
    folder = tmp_path / "model"
    shutil.copytree(llama[0], folder)
    free = run(engine(llama[0]), [[5, 6]])[0]
    end = next(token for index, token in enumerate(free) if index > 2 and free.index(token) == index)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": f"w{end}", "added_tokens_decoder": {str(end): {"content": f"w{end}", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    params = GREEDY.replace(ignore_eos=False)
    assert run(engine(str(folder)), [[5, 6]], params)[0] == free[: free.index(end) + 1]
    assert run(engine(str(folder), skip_tokenizer_init=True), [[5, 6]], params)[0] == free


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
        ({"prompt": 5}, GREEDY, "prompt_token_ids"),
        (5, GREEDY, "prompt_token_ids"),
        ({"prompt_token_ids": [1.5]}, GREEDY, "whole numbers"),
        ({"prompt_token_ids": [True]}, GREEDY, "whole numbers"),
        ({"prompt_token_ids": [2**70]}, GREEDY, "whole numbers"),
        ({"prompt_token_ids": [[5, 6]]}, GREEDY, "whole numbers"),
        ({"prompt_token_ids": "w5"}, GREEDY, "whole numbers"),
        ("w5", {"max_tokens": 3}, "params"),
        ("w5", [GREEDY], "2 prompts but 1"),
        ("w5", [GREEDY, {}], "SamplingParams"),
    ],
)
def test_bad_requests_are_refused_and_cost_nothing(llm: LLM, prompt: dict[str, Any], params: SamplingParams, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate([{"prompt_token_ids": [4, 5]}, prompt], params, use_tqdm=False)
    assert words in str(caught.value)
    assert_idle(llm)
    assert len(run(llm, [[4, 5]])[0]) == 24, "and it goes on"


def test_chat_renders_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "w5 w6"}]
    result = llm.chat(conversation, GREEDY, use_tqdm=False)[0]
    assert result.prompt_token_ids[-2:] == [5, 6] and result.prompt == "user w5 w6 "
    template = "{{ messages[0].content }}{% if add_generation_prompt %} w{{ number }}{% endif %}"
    options: dict[str, Any] = {"use_tqdm": False, "chat_template": template, "chat_template_kwargs": {"number": 9}}
    both = llm.chat([conversation, [{"role": "user", "content": "w8"}]], GREEDY, **options)
    assert [one.prompt_token_ids for one in both] == [[5, 6, 9], [8, 9]]
    assert llm.chat(conversation, GREEDY, add_generation_prompt=False, **options)[0].prompt_token_ids == [5, 6]
    assert llm.chat([], GREEDY, use_tqdm=False) == []
    for wrong in ("hello", [5], [[5]], [{"content": "w5"}]):
        with pytest.raises(RequestError, match="messages"):
            llm.chat(wrong, GREEDY, use_tqdm=False)


def test_special_tokens_in_a_message_are_plain_text(llm: LLM) -> None:
    """w2 ends a sequence; in a message it is six characters, which this vocabulary has no word for."""
    result = llm.chat([{"role": "user", "content": "w5 w2 w6"}], GREEDY, use_tqdm=False)[0]
    assert 5 in result.prompt_token_ids and 2 not in result.prompt_token_ids
    assert 2 in llm.generate("w5 w2 w6", GREEDY, use_tqdm=False)[0].prompt_token_ids


def test_the_family_has_its_say_in_conversations(llama: tuple[str, Any], tmp_path: Path) -> None:
    """Its stop strings end a reply, and its template serves a tokenizer that has none."""
    folder, source = tmp_path / "model", tmp_path / "chatty.py"
    shutil.copytree(llama[0], folder)
    (folder / "chat_template.jinja").unlink()
    free = run(engine(llama[0]), [[5, 6]])[0]
    stop, asked = f"w{free[3]} w{free[4]}", f"w{free[9]} w{free[10]}"
    source.write_text(
        "from light_sdk import ChatSpec, hookimpl\nlight_api = 1\n\n\n@hookimpl\ndef light_chat(model):\n"
        f"    return ChatSpec(template='{{{{ messages[0].content }}}}', stop=[{stop!r}])\n"
    )
    made = engine(str(folder), model_plugin=f"llama,{source}")
    conversation = [{"role": "user", "content": "w5 w6"}]
    for params in (GREEDY, GREEDY.replace(stop=asked)):
        result = made.chat(conversation, params, use_tqdm=False)[0]
        assert result.prompt_token_ids == [5, 6]
        assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", stop)
    assert made.generate("w5 w6", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == free, "no conversation"


def test_stop_strings_at_every_place(llm: LLM) -> None:
    """Across token borders or within a token, shown or not: the text ends where the first one is found."""
    text, before = llm.generate("w5 w6", GREEDY, use_tqdm=False)[0].outputs[0].text, llm.engine.stats().finished
    for start in range(0, len(text) - 9, 7):
        for length in (1, 3, 9):
            stop = text[start : start + length]
            for shown in (False, True):
                params = GREEDY.replace(stop=[stop], include_stop_str_in_output=shown, logprobs=0)
                output = llm.generate("w5 w6", params, use_tqdm=False)[0].outputs[0]
                assert output.text == text[: text.index(stop) + (length if shown else 0)]
                assert (output.finish_reason, output.stop_reason) == ("stop", stop)
                assert len(output.logprobs or ()) == len(output.token_ids)
    counted = llm.engine.stats().finished
    assert counted["stop"] > before.get("stop", 0) + 60 and counted.get("abort") == before.get("abort")
    token = llm.generate("w5 w6", GREEDY, use_tqdm=False)[0].outputs[0].token_ids[3]
    params = GREEDY.replace(stop_token_ids=[token], include_stop_str_in_output=True)
    assert llm.generate("w5 w6", params, use_tqdm=False)[0].outputs[0].text.endswith(f" w{token}")


def test_without_a_tokenizer(llama: tuple[str, Any]) -> None:
    made = engine(llama[0], skip_tokenizer_init=True)
    output = made.generate({"prompt_token_ids": [5, 6]}, GREEDY, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 24 and output.text == ""
    for prompt, params in (("w5", GREEDY), ({"prompt_token_ids": [5]}, GREEDY.replace(stop="w7"))):
        with pytest.raises(RequestError, match="tokenizer"):
            made.generate(prompt, params, use_tqdm=False)
    with pytest.raises(RequestError, match="tokenizer"):
        made.chat([{"role": "user", "content": "w5"}], use_tqdm=False)


def test_every_argument_of_the_signature(llama: tuple[str, Any]) -> None:
    made = LLM(
        llama[0],
        "llama",
        "dummy",
        torch.float32,
        "cpu",
        True,
        48,
        0.5,
        False,
        3,
        {"num_hidden_layers": 1, "rope_scaling": {"type": "linear", "factor": 2.0}},
        max_num_seqs=2,
    )
    resolved = made.engine.resolved
    assert (resolved.dtype, resolved.limits.max_model_len, resolved.limits.max_num_seqs) == ("float32", 48, 2)
    assert len(made.engine.runtime.layers) == 1 and made.engine.scheduler.tree is None
    first = made.generate([{"prompt_token_ids": np.array([4, 5])}] * 2, use_tqdm=False)
    assert [len(one.outputs[0].token_ids) for one in first] == [16, 16] and first[0].prompt_token_ids == [4, 5]
    assert made.generate([], use_tqdm=False) == []
    made.shutdown()
    assert all(parameter.is_meta for module in made.engine.runtime.modules.values() for parameter in module.parameters())
    with pytest.raises(RequestError, match="shut down"):
        made.generate({"prompt_token_ids": [4]}, use_tqdm=False)


def test_a_bar_shows_how_far_the_weights_are_on_a_terminal_only(llama: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        engine(llama[0], load_format="dummy").shutdown()
        assert ("weights: 100%" in stream.getvalue()) == stream.isatty()


def test_quantisation_that_a_family_loads_reaches_its_hooks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["QuantForCausalLM"], "quantization_config": {"quant_method": "fp8"}}')
    source = tmp_path / "quant.py"
    source.write_text(
        "from light_sdk import Family, KVGroup, KVLayout, WeightPlan, hookimpl\nfrom torch import nn\n\nlight_api = 1\n\n\n"
        "@hookimpl\ndef light_register_families(registry):\n"
        "    registry.add(Family('quant', ('QuantForCausalLM',), quantization=('fp8',)))\n"
        + "".join(
            f"\n\n@hookimpl\ndef light_{hook}:\n    return {answer}\n"
            for hook, answer in {
                "kv_layout(model)": "KVLayout((KVGroup((0,), ()),))",
                "weight_plan(model)": "WeightPlan(())",
                "pre_layer(model)": "nn.Identity()",
                "layer(model, layer_id)": "nn.Identity()",
                "post_layer(model)": "nn.Identity()",
            }.items()
        )
    )
    config = EngineConfig(model=str(tmp_path), model_plugin=str(source), device="cpu", load_format="dummy")
    assert bind_model(resolve_model(config), config, device="meta").model.quantization == "fp8"


@pytest.mark.parametrize(("gigabytes", "offline", "expected"), [(141, True, 16384), (24, True, 8192), (141, False, 8192)])
def test_token_budget_of_a_step(gigabytes, offline, expected, llama, monkeypatch):
    """Where nobody waits for a step and there is memory for it, it is larger; what was asked for is kept."""
    monkeypatch.setattr("light_core.engine.loading._memory_bytes", lambda device: gigabytes * 10**9)
    config = EngineConfig(model=str(llama[0]), model_plugin="llama")
    assert resolve_model(config, device="cuda:0", offline=offline).limits.max_num_batched_tokens == expected
    asked = config.replace(max_num_batched_tokens=100)
    assert resolve_model(asked, device="cuda:0", offline=offline).limits.max_num_batched_tokens == 100
    assert resolve_model(config, device="cpu", offline=offline).limits.max_num_batched_tokens == 512


def test_the_last_layer_goes_on_with_the_wanted_tokens_alone(llama: tuple[str, Any]) -> None:
    """Of a prompt one token is sampled after; in a chunk that is not its last none is, and one stands in."""
    made, rows = engine(llama[0], max_num_batched_tokens=32), []
    for layer in (made.engine.runtime.layers[0], made.engine.runtime.layers[-1]):
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    given = prompts(1, low=50, high=51)
    (tokens,) = run(made, given, GREEDY.replace(max_tokens=3))
    assert tokens == reference(llama[1], given[0], 3)
    assert rows == [32, 1, 18, 1, 1, 1, 1, 1]
    rows.clear()
    run(made, prompts(1, seed=1, low=50, high=51), GREEDY.replace(max_tokens=1, prompt_logprobs=1))
    assert rows == [32, 32, 18, 18], "logprobs of a prompt need all of its tokens"


class PaddedSteps:
    """In the place of recorded steps: pads to multiples of 40 tokens, and runs layers as they are recorded."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.num_padded = runner, 0

    def padded(self, num_tokens: int) -> int | None:
        size = -(-num_tokens // 40) * 40
        return None if size > self.runner.limits.max_num_batched_tokens else size

    def run(self, hidden: Any, step: Any) -> Any:
        self.num_padded += 1
        return run_by_tokens(self.runner.runtime, self.runner.kv, hidden, dict(step.shared), step)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 80}, {"max_num_seqs": 3}, {"max_total_tokens": 128, "max_model_len": 128}],
    ids=["plain", "chunked", "all-rows", "preempted"],
)
def test_padding_of_steps_with_prompts_is_nobodys(tiny: tuple[str, Any], expected: list[list[int]], options: dict[str, Any]) -> None:
    llm = engine(tiny[0], kernels={"attention": "reference"}, **options)
    llm.engine.runner._pieces = pieces = PaddedSteps(llm.engine.runner)
    assert run(llm, prompts(6)) == expected
    assert run(llm, prompts(6)) == expected, "a second time, out of the prefix cache"
    assert pieces.num_padded > 2


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
    assert "--max-model-len 10 or less, or --max-total-tokens 256 or more" in caught.value.block()
