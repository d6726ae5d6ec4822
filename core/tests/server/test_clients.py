"""The real openai client against a real server."""

import asyncio
from typing import Any

import openai
import pytest


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI, server: Any) -> None:
    reply = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=4)
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", "tiny")
    choice = reply.choices[0]
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    prompt = server.engine.requests[-1][0]
    tokenizer = server.context.tokenizer
    assert tokenizer.decode(prompt, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert choice.message.content == tokenizer.decode(prompt[:4])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 4)
    assert reply.usage.total_tokens == len(prompt) + 4


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    whole = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_helper_accumulates_one_role(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "hello world"}], max_tokens=60, n=2, stop="wor"
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert [choice.message.content for choice in final.choices] == ["user\nhello ", "user\nhello "]


def test_completion_and_models(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="alias", prompt=["hello", "world"], max_tokens=3, n=2, echo=True, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.model == "alias"
    assert answer.choices[2].text.startswith("world")
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]


def test_async_clients_do_not_mix(server: Any) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        text = f"stream {number} "
        stream = await client.completions.create(
            model="tiny", prompt=text, max_tokens=40, stream=True, extra_body={"add_special_tokens": False}
        )
        said = "".join([chunk.choices[0].text async for chunk in stream])
        assert said.startswith(text) and set(said.split()) <= {
            "stream",
            str(number),
            *(str(number)[:k] for k in range(9)),
            *("stream"[:k] for k in range(7)),
        }

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            await asyncio.gather(*(one(client, number) for number in range(100, 164)))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, None),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded"),
    ],
)
def test_errors_have_their_class(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **fields})
    assert caught.value.code == code
    assert caught.value.param == next(iter(fields))


def test_error_within_a_stream_raises(start: Any, tokenizer: Any) -> None:
    from light_core.server.stub import StubEngine

    server = start(StubEngine(tokenizer, step_s=0.02))
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="hello", max_tokens=400, stream=True)
        assert next(stream).choices[0].text is not None
        server.engine.failure = RuntimeError("secret detail /home/me")
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert "secret" not in str(caught.value) and "failed" in str(caught.value)
