"""LightLLM's own API."""

import json
from typing import Any


def test_generate(server: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello")
    answer = server.post("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 3, "do_sample": False, "temperature": 2}}).json()
    assert answer == {
        "generated_text": [tokenizer.decode(ids[:3])],
        "count_output_tokens": 3,
        "finish_reason": "length",
        "prompt_tokens": len(ids),
    }
    assert server.engine.requests[-1][1].greedy
    answer = server.post(
        "/generate", {"inputs": ids, "parameters": {"n": 2, "do_sample": True, "return_details": True, "max_new_tokens": 2}}
    ).json()
    assert (
        len(answer["generated_text"]) == 2 and answer["count_output_tokens"] == [2, 2] and answer["finish_reason"] == ["length", "length"]
    )
    assert [token["id"] for token in answer["tokens"][1]] == ids[:2]
    assert answer["tokens"][0][0]["special"] and answer["tokens"][0][0]["logprob"] < 0
    assert server.engine.requests[-1][1].temperature == 0.6


def test_generate_stream(server: Any, tokenizer: Any) -> None:
    ids = (tokenizer.encode("hello") * 4)[:4]
    response = server.post("/generate_stream", {"inputs": "hello", "parameters": {"max_new_tokens": 4}})
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data:{") for line in lines)
    events = [json.loads(line[5:]) for line in lines]
    assert [event["token"]["id"] for event in events] == ids
    assert "".join(event["token"]["text"] for event in events) == tokenizer.decode(ids)
    assert [event["token"]["count_output_tokens"] for event in events] == [1, 2, 3, 4]
    assert [event["finished"] for event in events] == [False, False, False, True]
    assert events[-1]["finish_reason"] == "length"


def test_stop_sequences(server: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    base = {"max_new_tokens": 8, "add_special_tokens": False}
    answer = server.post("/generate", {"inputs": "hello world", "parameters": {**base, "stop_sequences": [[ids[1]]]}}).json()
    assert (answer["finish_reason"], answer["count_output_tokens"]) == ("stop", 2)
    answer = server.post("/generate", {"inputs": "hello world", "parameters": {**base, "stop_sequences": "wor"}}).json()
    assert (answer["finish_reason"], answer["generated_text"]) == ("stop", ["hello "])


def test_refusals_name_the_field(server: Any) -> None:
    cases = {
        "max_new_tokens": 0,
        "min_new_tokens": 99,
        "best_of": 0,
        "guided_grammar": "root ::= x",
        "stop_sequences": [{}],
        "exponential_decay_length_penalty": [1, 2.0],
        "temperature": "hot",
    }
    for name, value in cases.items():
        answer = server.post("/generate", {"inputs": "x", "parameters": {name: value}})
        assert answer.status_code == 400, name
        assert name in answer.json()["error"]["message"] or name == "best_of"
    assert server.post("/generate", {"inputs": "x", "multimodal_params": {"images": [{}]}}).status_code == 400
    assert server.post("/generate", {"parameters": {}}).json()["error"]["param"] == "inputs"
    assert server.post("/generate_stream", {"inputs": "x", "parameters": {"n": 2}}).status_code == 400
