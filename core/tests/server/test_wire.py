"""What goes over the wire, rule by rule."""

import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from light_core.engine.requests import TokenLogprobs
from light_core.server.client import Delta
from light_core.server.stub import StubEngine

Read = Callable[[httpx.Response], list[Any]]


@pytest.mark.parametrize("n", [1, 3])
def test_role_comes_once_a_choice_and_finish_is_last(server: Any, read_events: Read, n: int) -> None:
    response = server.chat("hello world", stream=True, n=n)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    events = read_events(response)
    assert events.pop() == "[DONE]"
    for index in range(n):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] == "length"
        assert all(choice["finish_reason"] is None for choice in own[:-1])
        assert all(choice["delta"]["content"] for choice in own[1:-1])
    if n > 1:
        order = [event["choices"][0]["index"] for event in events]
        assert order != sorted(order), "outputs of one request interleave"


def test_chunks_are_constant_in_id_created_and_model(server: Any, read_events: Read) -> None:
    for response, kind, prefix in (
        (server.chat(stream=True), "chat.completion.chunk", "chatcmpl-"),
        (server.complete(stream=True), "text_completion", "cmpl-"),
    ):
        chunks = read_events(response)[:-1]
        assert {chunk["object"] for chunk in chunks} == {kind}
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        assert chunks[0]["id"].startswith(prefix) and type(chunks[0]["created"]) is int


@pytest.mark.parametrize("path", ["complete", "chat"])
def test_usage_only_where_asked_for(server: Any, read_events: Read, path: str) -> None:
    ask = getattr(server, path)
    plain = read_events(ask(max_tokens=4, stream=True))[:-1]
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
    *chunks, last = read_events(ask(max_tokens=4, stream=True, stream_options={"include_usage": True}))[:-1]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == ask(max_tokens=4).json()["usage"]
    chunks = read_events(ask(max_tokens=4, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and 1 <= counts[0] < 4 and counts[-1] == 4
    assert ask(stream_options={"include_usage": True}).status_code == 400
    assert ask(stream_options={"include_usage": True}).json()["error"]["param"] == "stream_options"


@pytest.mark.parametrize("path", ["complete", "chat"])
def test_stream_and_document_say_the_same(server: Any, read_events: Read, path: str) -> None:
    fields = {"max_tokens": 40, "n": 2, "stop": ["wor", "zzz"]}
    ask = getattr(server, path)
    whole = ask("hello wörld 👍 world", **fields).json()
    texts, reasons = ["", ""], [None, None]
    for event in read_events(ask("hello wörld 👍 world", stream=True, **fields))[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["text"] if path == "complete" else choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    said = [choice["text"] if path == "complete" else choice["message"]["content"] for choice in whole["choices"]]
    assert said == texts
    assert texts[0].endswith("hello wörld 👍 ") and reasons == ["stop", "stop"]
    assert whole["choices"][0]["stop_reason"] == "wor"


def test_an_error_within_a_stream_is_an_event_and_done_follows(start: Any, tokenizer: Any, read_events: Read) -> None:
    class Failing(StubEngine):
        async def generate(self, prompt: Any, params: Any, *, salt: str = "", media: Any = ()) -> Any:
            yield Delta(0, "he", (1,))
            yield Delta(0, "", (), finish_reason="error", error="cuda failed at 0x7fffdeadbeef")

    server = start(Failing(tokenizer))
    events = read_events(server.complete(stream=True))
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["type"] == "server_error" and "0x" not in events[-2]["error"]["message"]
    answer = server.complete()
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-should-retry"] == "false"


def test_null_is_absent(server: Any) -> None:
    names = [
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "logprobs",
        "max_completion_tokens",
        "stream",
        "stream_options",
        "logit_bias",
        "user",
        "best_of",
        "response_format",
    ]
    nulls = dict.fromkeys(names)
    assert server.complete(**nulls).status_code == 200
    assert server.chat(**nulls, tools=None, tool_choice=None, top_logprobs=None).status_code == 200


def test_unknown_fields_are_ignored_with_one_warning(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert server.complete(frobnicate=1).status_code == 200
    assert sum("frobnicate" in record.getMessage() for record in caplog.records) == 1


def test_max_completion_tokens_goes_before_max_tokens(server: Any) -> None:
    assert server.chat(max_tokens=9, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3
    assert server.complete().json()["usage"]["completion_tokens"] == 16


def test_roles_and_content_parts(server: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "audio": None,
            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "42"},
    ]
    assert server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).status_code == 200
    prompt = tokenizer.decode(server.engine.requests[-1][0], skip_special_tokens=False)
    assert prompt.startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )


def test_completion_logprobs(server: Any, tokenizer: Any, read_events: Read) -> None:
    answer = server.complete("hello", max_tokens=1, logprobs=1, echo=True, temperature=0).json()
    logprobs, ids = answer["choices"][0]["logprobs"], tokenizer.encode("hello")
    assert len({len(value) for value in logprobs.values()}) == 1 and len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["tokens"] == [tokenizer.token_text(token) for token in [*ids, ids[0]]]
    for token, value, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]))[1:]:
        assert top[token] == value == max(top.values())
    assert logprobs["text_offset"] == [sum(map(len, logprobs["tokens"][:k])) for k in range(len(ids) + 1)]
    joined: dict[str, list[Any]] = {name: [] for name in logprobs}
    text = ""
    for event in read_events(server.complete("hello", max_tokens=1, logprobs=1, echo=True, stream=True))[:-1]:
        text += event["choices"][0]["text"]
        for name, values in event["choices"][0]["logprobs"].items():
            joined[name] += values
    assert joined == logprobs and text == answer["choices"][0]["text"]


def test_chat_logprobs(server: Any, read_events: Read) -> None:
    content = server.chat(logprobs=True, top_logprobs=2, max_tokens=3).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert math.isclose(entry["logprob"], -math.log(2)) and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    events = read_events(server.chat(logprobs=True, top_logprobs=2, max_tokens=3, stream=True))[:-1]
    streamed = [entry for event in events for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content
    assert server.chat(top_logprobs=2).status_code == 400


def test_minus_infinity_is_a_number(start: Any, tokenizer: Any) -> None:
    class Never(StubEngine):
        async def generate(self, prompt: Any, params: Any, *, salt: str = "", media: Any = ()) -> Any:
            yield Delta(0, "x", (5,), [TokenLogprobs(-math.inf, 9, ((6, 0.0), (7, -math.inf)))], finish_reason="length")

    server = start(Never(tokenizer))
    logprobs = server.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0] and min(logprobs["top_logprobs"][0].values()) == -9999.0
    assert server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_prompt_kinds(server: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello")
    for prompt, count in (("hello", 1), (["hello"], 1), (ids, 1), ([ids, ids[:2]], 2), (["a", "b", "c"], 3)):
        answer = server.complete(prompt, max_tokens=2)
        assert answer.status_code == 200 and [choice["index"] for choice in answer.json()["choices"]] == list(range(count))
    assert server.complete(ids, echo=True, max_tokens=1).json()["choices"][0]["text"].startswith("<s>hello")
    assert server.engine.requests[-1][0] == ids
    for prompt in ([], "", [[]], [1, "a"], ["a", 1], [["a"]], [tokenizer.vocab_size], [-1], [True], [[1], [2**70]], [1.5], {}, 7):
        answer = server.complete(prompt, add_special_tokens=False)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt"), prompt


def test_refused_fields(server: Any) -> None:
    for fields in (
        {"suffix": "x"},
        {"best_of": 2},
        {"guided_json": {}},
        {"response_format": {"type": "json_object"}},
        {"n": 2, "best_of": 1},
    ):
        answer = server.complete(**fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in fields
    assert server.complete(n=2, best_of=2).status_code == 200
    for fields in (
        {"chat_template": "x"},
        {"functions": [{}]},
        {"tool_choice": "required"},
        {"modalities": ["audio"]},
        {"documents": [{}]},
    ):
        answer = server.chat(**fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] in fields
    assert server.chat([{"type": "image_url", "image_url": {"url": "http://x"}}]).status_code == 400


@pytest.mark.parametrize(
    "name", ["tokenize", "chat_template", "tokenizer", "messages", "return_tensors", "__class__", "add_generation_prompt"]
)
def test_reserved_template_variables(server: Any, name: str) -> None:
    answer = server.chat(chat_template_kwargs={name: True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"


def test_template_variables_and_tools_reach_the_template(server: Any, tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    assert server.chat(chat_template_kwargs={"shout": True, "other": 1}, tools=tools, max_tokens=1).status_code == 200
    prompt = tokenizer.decode(server.engine.requests[-1][0], skip_special_tokens=False)
    assert '"name": "look"' in prompt and "LOUD" in prompt
    server.chat(tools=tools, tool_choice="none", max_tokens=1)
    assert "look" not in tokenizer.decode(server.engine.requests[-1][0])


def test_continue_final_message(server: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert tokenizer.decode(server.engine.requests[-1][0], skip_special_tokens=False).endswith("assistant\nThe answer")
    assert server.post("/v1/chat/completions", {**body, "add_generation_prompt": True}).status_code == 400


@pytest.mark.parametrize("times", [1, 1000])
def test_special_tokens_in_messages_are_text(start: Any, tokenizer: Any, times: int) -> None:
    server = start(StubEngine(tokenizer, max_model_len=100_000))
    for special in ("<|im_end|>", "<s>", "</s>", "<|im_start|>"):
        assert server.chat(f"a{special * times}b", max_tokens=1).status_code == 200
        prompt = server.engine.requests[-1][0]
        assert sum(token in tokenizer.special_ids for token in prompt) == 3, "those of the template alone"
        assert f"a{special * times}b" in tokenizer.decode(prompt, skip_special_tokens=False)


def test_generation_config_stands_in(server: Any, start: Any) -> None:
    server.complete(top_p=0.5)
    params = server.engine.requests[-1][1]
    assert (params.temperature, params.top_p) == (0.6, 0.5)
    plain = start(generation_config="none")
    plain.complete()
    assert plain.engine.requests[-1][1].temperature == 1.0


def test_return_token_ids_and_prompt_logprobs(server: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello")
    choice = server.complete("hello", max_tokens=2, return_token_ids=True, prompt_logprobs=1).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids[:2])
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1][str(ids[1])]["decoded_token"] == tokenizer.token_text(ids[1])
    chat = server.chat(max_tokens=2, return_token_ids=True, prompt_logprobs=0).json()
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"]) and len(chat["choices"][0]["token_ids"]) == 2


def test_request_id_is_echoed(server: Any) -> None:
    assert server.complete().headers["x-request-id"]
    assert server.http.get("/nowhere", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.http.get("/version", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_models_names_the_plugin(server: Any) -> None:
    entries = server.http.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in entries] == ["tiny", "alias"]
    assert entries[0]["max_model_len"] == 512 and "stub" in entries[0]["plugin"] and entries[0]["object"] == "model"


def test_small_routes(server: Any) -> None:
    for path in ("/", "/ping", "/version", "/health", "/health/live", "/health/ready"):
        assert server.http.get(path).status_code == 200
        head = server.http.head(path)
        assert head.status_code == 200 and head.content == b""


def test_tokenize_and_back(server: Any, tokenizer: Any) -> None:
    answer = server.post("/tokenize", {"prompt": "héllo", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("héllo") and answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
    assert len(answer["token_strs"]) == answer["count"]
    assert server.post("/tokenize", {"prompt": "x", "add_special_tokens": False}).json()["tokens"] == tokenizer.encode("x", False)
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "<s>héllo"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    server.chat("x")
    assert chat["tokens"] == server.engine.requests[-1][0]
    for body in ({}, {"prompt": "x", "messages": []}, {"tokens": [10**6]}):
        assert server.post("/detokenize" if "tokens" in body else "/tokenize", body).status_code == 400


def test_openapi_describes_requests_and_answers(server: Any) -> None:
    document = server.http.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][body.rpartition("/")[2]]
    assert {"messages", "temperature", "stream"} <= set(schema["properties"]) and schema["required"] == ["messages"]

    def refs(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [ref for item in value.values() for ref in refs(item)]
        return [ref for item in value for ref in refs(item)] if isinstance(value, list) else []

    assert {ref.rpartition("/")[2] for ref in refs(document)} <= set(document["components"]["schemas"])


def test_without_a_tokenizer(start: Any) -> None:
    server = start(no_tokenizer=True)
    choice = server.complete([5, 6, 7], max_tokens=2, return_token_ids=True, logprobs=0).json()["choices"][0]
    assert choice["token_ids"] == [5, 6] and choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]
    for answer in (server.complete("text"), server.chat("text"), server.complete([5], stop="x"), server.post("/tokenize", {"prompt": "x"})):
        assert answer.status_code == 400 and "tokenizer" in answer.json()["error"]["message"]
