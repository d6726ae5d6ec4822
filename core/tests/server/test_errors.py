"""Bad input: never a 5xx, always an OpenAI-shaped body that gives nothing away."""

import concurrent.futures
import itertools
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from light_core.errors import OverloadedError
from light_core.server.client import EngineState
from light_core.server.gateway import PUBLIC_PATHS
from light_core.server.stub import StubEngine
from light_core.text import chat

LEAK = re.compile(r"/home|/root|site-packages|0x[0-9a-f]{6,}|Traceback")
ALLOWED = {200, 400, 401, 404, 405, 408, 411, 413, 415, 429, 431}


def check(answer: httpx.Response) -> int:
    assert answer.status_code in ALLOWED, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert not LEAK.search(answer.text)
    return answer.status_code


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"[" * 100,
    b"[" * 100_000,
    b'{"prompt":' * 10_000,
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00x"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "a\x00b"}',
    '{"prompt": "x"}'.encode("utf-16"),
    "\ufeff{}".encode(),
    b'{"prompt": "x"} trailing',
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_hostile_json_is_400(server: Any, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert check(answer) == 400


def test_many_keys_and_duplicate_keys(server: Any) -> None:
    body = b'{"prompt": "a", "prompt": "hello", ' + b",".join(b'"k%d": 1' % key for key in range(100_000)) + b"}"
    assert check(server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})) == 200


def test_deeply_nested_messages(server: Any) -> None:
    for depth in (50, 300, 900):
        body = b'{"max_tokens": 1, "messages": [{"role": "user", "content": "x", "extra": ' + b"[" * depth + b"]" * depth + b"}]}"
        answer = server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert check(answer) in (200, 400)


NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1", "0", str(2**31), str(2**63), "1" + "0" * 500, "true", '"1"', "null", "[]", "{}")
NUMERIC = [
    "n",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "top_logprobs",
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_number_with_every_odd_value(server: Any, path: str) -> None:
    own = '"prompt": "x"' if path == "/v1/completions" else '"messages": [{"role": "user", "content": "x"}], "max_tokens": 2'
    for name, value in itertools.product(NUMERIC, NUMBERS):
        body = f'{{{own}, "{name}": {value}}}'
        check(server.http.post(path, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("size", [0, 1, 64, 65, 4096, 4097, 100_000])
def test_every_list_at_every_length(start: Any, server: Any, size: int) -> None:
    lists: dict[str, Any] = {
        "stop": ["a"] * size,
        "stop_token_ids": [1] * size,
        "allowed_token_ids": [1] * size,
        "logit_bias": {str(key): 1 for key in range(size)},
    }
    for name, value in lists.items():
        check(server.complete(**{name: value, "max_tokens": 1}))
    for prompt in (["a"] * min(size, 2000), [1] * size, [[1]] * min(size, 2000)):
        check(server.complete(prompt, max_tokens=1))
    message = {"role": "user", "content": "x"}
    for body in ({"messages": [message] * size}, {"messages": [message], "tools": [{}] * size}):
        check(server.post("/v1/chat/completions", {**body, "max_tokens": 1}))


@pytest.mark.parametrize(
    "message",
    [{}, {"role": 1}, {"role": ""}, {"role": "x" * 100}, {"role": "user", "content": 1}, {"role": "user", "content": [1]},
     {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": [{"type": ["text"]}]},
     {"role": "assistant", "tool_calls": 1}, {"role": "assistant", "tool_calls": [1]}],
)  # fmt: skip
def test_odd_messages(server: Any, message: Any) -> None:
    answer = server.post("/v1/chat/completions", {"messages": [message], "max_tokens": 1})
    assert check(answer) == 400 and answer.json()["error"]["param"] == "messages"


def test_message_names_field_value_and_range(server: Any) -> None:
    error = server.complete("hello", max_tokens=600).json()["error"]
    assert error["param"] == "max_tokens" and "600" in error["message"] and "512" in error["message"] and "at most 5" in error["message"]
    error = server.complete("hello", temperature=-3.5).json()["error"]
    assert error["param"] == "temperature" and "-3.5" in error["message"]
    error = server.complete("hello", temperature="hot").json()["error"]
    assert error["param"] == "temperature" and "expected" in error["message"]
    assert server.post("/v1/completions", {}).json()["error"] == {
        "message": "prompt is required", "type": "invalid_request_error", "param": "prompt", "code": None,
    }  # fmt: skip


def test_too_long_prompts(server: Any) -> None:
    for prompt in ("x" * 1000, "x" * 10_000_000, [5] * 512):
        answer = server.complete(prompt, max_tokens=1)
        assert check(answer) == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.complete([5] * 511, max_tokens=1).status_code == 200


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(
            ["n", "stop", "logprobs", "temperature", "prompt", "messages", "stream", "stream_options", "echo", "tools", "seed", "model"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
            max_leaves=6,
        ),
    )
)
def test_any_json_is_answered(server: Any, body: dict[str, Any]) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize"):
        try:
            answer = server.post(path, {"prompt": "x", "max_tokens": 2, **body})
        except UnicodeEncodeError:
            return
        check(answer)


def test_statuses_without_a_route(server: Any) -> None:
    assert check(server.http.get("/nowhere")) == 404
    assert check(server.http.get("/v1/completions")) == 405
    assert check(server.http.delete("/health")) == 405
    assert check(server.http.post("/v1/completions", content="x=1", headers={"Content-Type": "text/plain"})) == 415
    assert check(server.http.post("/v1/completions", content="{}")) == 415
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert check(server.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)) == 415


def test_engine_states(start: Any, tokenizer: Any) -> None:
    server = start(StubEngine(tokenizer))
    for state in (EngineState.LOADING, EngineState.DRAINING, EngineState.DEAD):
        server.engine.state = state
        for answer in (server.complete(), server.chat(), server.http.get("/v1/models"), server.post("/generate", {"inputs": "x"})):
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == f"engine_{state.value}"
        for path in ("/health", "/health/ready", "/ping"):
            answer = server.http.get(path)
            assert answer.status_code == 503 and answer.json()["status"] == state.value
        assert server.http.get("/health/live").status_code == 200
        assert server.http.get("/metrics").status_code == 200
    server.engine.state, server.engine.progress = EngineState.LOADING, {"phase": "weights", "progress": 0.4}
    assert server.http.get("/health").json() == {"status": "loading", "phase": "weights", "progress": 0.4}


def test_overload_is_429_also_for_streams(start: Any, tokenizer: Any) -> None:
    server = start(StubEngine(tokenizer, max_running=0))
    for stream in (False, True):
        answer = server.complete(stream=stream)
        assert check(answer) == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error" and answer.json()["error"]["code"] == "server_overloaded"


def test_tokenisation_is_bounded(start: Any, tokenizer: Any) -> None:
    server = start(max_pending_tokenizations=1)
    server.call(lambda: setattr(server.context.prompts, "_pending", 1))
    assert check(server.complete()) == 429
    assert server.complete([1, 2]).status_code == 200
    server.call(lambda: setattr(server.context.prompts, "_pending", 0))
    for _ in range(5):
        assert server.complete().status_code == 200


def test_an_unexpected_error_is_a_plain_500(start: Any, tokenizer: Any) -> None:
    class Broken(StubEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("/root/secret 0x7fffffffffff")

    answer = start(Broken(tokenizer)).complete()
    assert answer.status_code == 500 and not LEAK.search(answer.text) and answer.json()["error"]["type"] == "server_error"


def test_a_slow_template_is_stopped_and_others_go_on(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's time passes only after others have had their answers."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    server = start(chat_template=loop, template_timeout_s=1.0)
    reads, may_pass = itertools.count(), threading.Event()
    looked_often = threading.Event()

    def monotonic() -> float:
        if next(reads) > 1000:
            looked_often.set()
        return time.monotonic() if may_pass.is_set() else 0.0

    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=monotonic))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit(server.chat)
        try:
            assert looked_often.wait(60), "the template does not run"
            for _ in range(3):
                assert httpx.get(server.url + "/health/live", timeout=60).status_code == 200
            assert not slow.done()
        finally:
            may_pass.set()
    assert check(slow.result()) == 400


def test_no_chat_template(start: Any, tokenizer_folder: Any) -> None:
    from light_core.text.tokenizer import load_tokenizer

    bare = load_tokenizer(tokenizer_folder)
    bare.hf.chat_template = None
    answer = start(served=bare).chat()
    assert check(answer) == 400 and answer.json()["error"]["code"] == "no_chat_template"


# ------------------------------------------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def keyed(start: Any) -> Any:
    return start(api_keys=("secret-one", "secret-two"))


def test_every_route_needs_a_key_unless_listed(keyed: Any) -> None:
    for route in keyed.app.routes:
        path = route.path
        for method in route.methods:
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-one"}, {"Authorization": "Basic secret-one"}):
                answer = keyed.http.request(method, path, headers=header)
                if path in PUBLIC_PATHS:
                    assert answer.status_code in (200, 503)
                else:
                    assert answer.status_code == 401, (method, path)
                    assert method == "HEAD" or check(answer)
    assert {"/health", "/health/live", "/health/ready", "/ping", "/version"} == PUBLIC_PATHS


@pytest.mark.parametrize("key", ["secret-one", "secret-two"])
def test_any_key_opens(keyed: Any, key: str) -> None:
    header = {"Authorization": f"Bearer {key}"}
    assert keyed.http.get("/v1/models", headers=header).status_code == 200
    assert keyed.complete(headers=None).status_code == 401
    assert keyed.http.post("/v1/completions", json={"prompt": "x"}, headers=header).status_code == 200


@pytest.mark.parametrize(
    "target",
    ["//v1/models", "/v1%2fmodels", "/V1/models", "/v1/models?x=/health", "/v1/models;/health", "/health/../v1/models",
     "/health%2f..%2fv1/models", "http://evil/v1/models", "/./v1/models", "/health/", "/health//", "/%68ealth/../v1/models", "*"],
)  # fmt: skip
@pytest.mark.parametrize("extra", [b"", b"X-Forwarded-Prefix: /health\r\n", b"X-Original-URL: /health\r\n"])
def test_odd_paths_stay_closed(keyed: Any, target: str, extra: bytes) -> None:
    for host in (b"127.0.0.1", b"evil/health?", b""):
        request = b"GET " + target.encode() + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n" + extra + b"\r\n"
        answer = keyed.raw(request)
        assert answer.split(b" ", 2)[1] in (b"401", b"400"), answer
        assert b"tiny" not in answer and b"secret" not in answer


def test_keys_are_told_nowhere(keyed: Any) -> None:
    header = {"Authorization": "Bearer secret-one"}
    for path in ("/", "/metrics", "/openapi.json", "/version", "/v1/models"):
        assert "secret" not in keyed.http.get(path, headers=header).text


def test_cors_only_by_setting(start: Any, server: Any) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert server.http.options("/v1/completions", headers=headers).status_code == 405
    opened = start(api_keys=("k",), allowed_origins=("https://a.example",))
    assert opened.http.options("/v1/completions", headers=headers).headers["access-control-allow-origin"] == "https://a.example"
    assert opened.http.get("/v1/models", headers=headers).status_code == 401
    assert "access-control-allow-origin" not in opened.http.get("/health", headers={"Origin": "https://b.example"}).headers


def test_overloaded_error_keeps_its_delay() -> None:
    from light_core.server.errors import problem_of

    assert problem_of(OverloadedError("full", 7)).headers == {"Retry-After": "7"}
