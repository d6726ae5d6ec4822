"""`light serve` and the other commands as a stranger meets them: real processes, the real `openai` package, the demo
model, and the echo family, whose output can be predicted token by token.

Servers are shared by the tests of this module; one that a test ends is its own.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from light_sdk.testing.echo import predict, write_model

LIGHT = str(Path(sys.executable).with_name("light"))
ECHO = ("--model-plugin", "light_sdk.testing.echo")
START_S, FENCE_S = 600, 240
"""After which a server that is not ready, or what should happen at once, has failed to."""
KEY = "sk-of-the-test"
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR) +(light|http|detokenizer|engine) +\S")


class Server:
    """A `light serve` of its own, on a free port."""

    def __init__(self, *arguments: str, key: str = "none", **environment: str) -> None:
        self.log_file = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - closed by `close`
        command = [LIGHT, "serve", *arguments, "--device", "cpu", "--port", "0", "--drain-delay", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log_file, env=os.environ | environment, start_new_session=True
        )
        self.key = key

    def ready(self) -> "Server":
        """Waits for the line that says so."""
        found = self.wait_for(lambda: re.search(r"ready in [\d.]+ s: (http://[\d.]+:\d+)/v1", self.log), START_S)
        self.url = found[1]
        headers = {"Authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=2 * FENCE_S)
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key=self.key, max_retries=0, timeout=2 * FENCE_S)
        self.model = self.openai.models.list().data[0].id
        return self

    @property
    def log(self) -> str:
        return Path(self.log_file.name).read_text()

    @property
    def pids(self) -> dict[str, int]:
        return {role: int(pid) for role, pid in re.findall(r"started the (\w+) process \((\d+)\)", self.log)}

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = FENCE_S) -> Any:
        """What `condition` gives once it is true."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if value := condition():
                return value
            assert self.process.poll() is None or "ready in" in self.log, self.log
            time.sleep(0.01)
        raise AssertionError(f"it did not happen in {timeout_s} s:\n{self.log}")

    def metrics(self) -> dict[str, float]:
        """Every sample without a bucket, by name (of request_success by reason too)."""
        answer = self.http.get("/metrics")
        assert answer.status_code == 200
        found = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                if "le" not in sample.labels:
                    reason = sample.labels.get("finished_reason") or sample.labels.get("status")
                    found[f"{sample.name}:{reason}" if reason else sample.name] = sample.value
        return found

    def quiet(self) -> dict[str, float]:
        """Metrics once nothing runs and no KV is held."""

        def idle() -> dict[str, float] | None:
            metrics = self.metrics()
            busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"] + metrics["vllm:kv_cache_usage_perc"]
            return None if busy else metrics

        return self.wait_for(idle)

    def ended(self) -> int:
        """The exit code; no process is left and the port is free."""
        pids = self.pids.values()
        code = self.process.wait(FENCE_S)
        self.wait_for(lambda: not any(alive(pid) for pid in pids))
        self.wait_for(self._port_is_free)
        return code

    def _port_is_free(self) -> bool:
        """Somebody else may have it by now, but none who keeps it."""
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", int(self.url.rpartition(":")[2]))):
            return True
        return False

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(FENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if hasattr(self, "http"):
            self.http.close()
            self.openai.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log_file.close()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo, with settings from a file, the environment and the command line, each of which beats the one before."""
    config = tmp_path_factory.mktemp("config") / "serve.yaml"
    config.write_text("served-model-name: [demo, small]\nmax-num-seqs: 16\nmax-logprobs: 4\nstats_interval: 100000\n")
    server = Server("demo", "--config", str(config), "--max-logprobs", "7", LIGHT_MAX_LOGPROBS="6", LIGHT_STATS_INTERVAL="0.3")
    try:
        yield server.ready()
    finally:
        server.close()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The echo family with a KV pool for five requests or so, behind a key; `echo.config` is its config.json. An output takes
    it several times as long as a client needs to ask for the next, so that requests sent together do meet."""
    folder = tmp_path_factory.mktemp("echo")
    config = write_model(folder, echo_rule="checksum", max_len=256, step_delay_ms=8)
    server: Any = Server(
        str(folder), *ECHO, "--served-model-name", "echo", "--max-total-tokens", "512", "--api-key", KEY, "--max-num-seqs", "32", key=KEY
    )
    server.config = config
    try:
        yield server.ready()
    finally:
        server.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Server]:
    """An echo server whose steps take 50 ms, and that gives requests ten minutes when it is told to end; for a test that
    ends it."""
    write_model(tmp_path / "slow", step_delay_ms=50)
    server = Server(str(tmp_path / "slow"), *ECHO, "--shutdown-timeout", "600")
    try:
        yield server.ready()
    finally:
        server.close()


def run(*arguments: str, text: str = "", timeout_s: float = 240, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A `light` command that ends by itself."""
    return subprocess.run(
        [LIGHT, *arguments], input=text, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ | environment
    )


# ------------------------------------------------------------------------------------------- the start


def test_log_of_a_start(demo: Server) -> None:
    lines = demo.log[: demo.log.index(" (docs at /docs)")].splitlines()
    assert all(LINE.match(line) for line in lines), demo.log
    texts = [line.split(maxsplit=3)[3] for line in lines]
    assert len(set(texts)) == len(texts), "a line is told twice"
    assert texts[0] == "light 1.0.0: demo by light-plugin-llama 1.0.0 (llama)"
    for words in ("weights ready in", "kernel attention: ", "KV pool", "loaded in"):
        assert sum(words in text for text in texts) == 1, words
    assert re.search(r"loaded in [\d.]+ s: imports [\d.]+, plugins [\d.]+, weights [\d.]+, memory [\d.]+", demo.log)
    assert demo.log.count("ready in ") == 2 and demo.log.count(f": {demo.url}/v1 (docs at /docs)") == 1, "once by weights, once by all"
    assert not re.search("(?i)warning|traceback|deprecated", demo.log)


def test_the_line_to_try_works(demo: Server) -> None:
    (command,) = re.findall(r"try it: (curl .*)", demo.log)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, text=True, timeout=FENCE_S, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] and answer["model"] == "demo"


def test_settings_of_file_environment_and_command_line(demo: Server) -> None:
    assert [model.id for model in demo.openai.models.list().data] == ["demo", "small"], "of the file"
    prompt = {"model": "small", "prompt": "Hello", "max_tokens": 1}
    assert demo.http.post("/v1/completions", json=prompt | {"logprobs": 7}).status_code == 200, "the command line goes first"
    assert demo.http.post("/v1/completions", json=prompt | {"logprobs": 8}).status_code == 400
    demo.http.post("/v1/completions", json=prompt | {"max_tokens": 300, "ignore_eos": True})
    throughput = r"prompt \d+ tok/s, output [1-9]\d* tok/s, running \d+, waiting 0, KV [\d.]+ %"
    demo.wait_for(lambda: re.search(throughput, demo.log))  # the environment's 0.3 s, not the file's day


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "there is no model 'no-such-model'"),
        (["demo", "--model-plugin", "llamma"], "llama"),
        (["demo", "--max-num-seqs", "0"], "max_num_seqs"),
        (["demo", "--generation-config", "perhaps"], "perhaps"),
        (["demo", "--host", "192.0.2.7"], "192.0.2.7"),
    ],
)
def test_errors_before_anything_starts(arguments: list[str], words: str) -> None:
    done = run("serve", "--port", "0", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "cause", "try"], done.stderr
    assert words in done.stderr and "started the" not in done.stderr


def test_no_plugin_for_the_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalML"]}))
    done = run("serve", str(tmp_path), "--port", "0")
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "cause", "try"], done.stderr
    assert "LlamaForCausalML" in done.stderr and "LlamaForCausalLM" in done.stderr, "the nearest is named"


def test_port_taken(demo: Server) -> None:
    port = demo.url.rpartition(":")[2]
    done = run("serve", "demo", "--port", port)
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "cause", "try"], done.stderr
    assert f"port {port}" in done.stderr and re.search(r"process \d+ \(.*(light http|light_core\.processes\.http)", done.stderr), (
        done.stderr
    )


def test_an_error_while_loading(tmp_path: Path) -> None:
    """What only the engine can find out still ends in one block and nothing else of it."""
    write_model(tmp_path / "echo", max_len=64)
    (tmp_path / "echo" / "model.safetensors").unlink()
    done = run("serve", str(tmp_path / "echo"), *ECHO, "--port", "0", "--device", "cpu")
    block = done.stderr.rpartition("\n\n")[2].splitlines()
    assert done.returncode == 2 and [line.partition(":")[0] for line in block] == ["error", "cause", "try"], done.stderr
    assert "safetensors" in block[1] and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- the API, on the demo


def test_chat_ends_by_itself(demo: Server) -> None:
    for content in ("Hello", "Hello, who are you?"):
        answer = demo.openai.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=400
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop", choice
        assert choice.message.role == "assistant" and choice.message.content and "<|" not in choice.message.content
        assert answer.usage is not None and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_stream_is_the_same_text_in_pieces(demo: Server) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 200}
    whole = demo.openai.chat.completions.create(**asked)
    chunks = list(demo.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 1
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_n_and_seed(demo: Server) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "The", "n": 4, "temperature": 1.5, "max_tokens": 24, "seed": 11}
    first = demo.openai.completions.create(**asked, extra_body={"ignore_eos": True})
    again = demo.openai.completions.create(**asked, extra_body={"ignore_eos": True})
    other = demo.openai.completions.create(**asked | {"seed": 12}, extra_body={"ignore_eos": True})
    texts = [choice.text for choice in sorted(first.choices, key=lambda choice: choice.index)]
    assert len(texts) == 4 and len(set(texts)) > 1, "outputs of one request differ"
    assert [choice.text for choice in sorted(again.choices, key=lambda choice: choice.index)] == texts
    assert [choice.text for choice in sorted(other.choices, key=lambda choice: choice.index)] != texts
    assert first.usage is not None and first.usage.completion_tokens == 4 * 24


def test_stop_strings(demo: Server) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "The", "temperature": 0, "max_tokens": 40}
    free = demo.openai.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    stop = free[8:11]
    choice = demo.openai.completions.create(**asked, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert choice.text == free[: free.index(stop)] and choice.finish_reason == "stop"
    kept = demo.openai.completions.create(**asked, stop=[stop], extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
    assert kept.choices[0].text == free[: free.index(stop)] + stop


def test_logprobs_and_echo(demo: Server) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "Hello there", "temperature": 0, "max_tokens": 5}
    plain = demo.openai.completions.create(**asked, logprobs=2).choices[0]
    echoed = demo.openai.completions.create(**asked, logprobs=2, echo=True).choices[0]
    assert plain.logprobs is not None and echoed.logprobs is not None
    assert echoed.text == "Hello there" + plain.text
    assert plain.logprobs.token_logprobs is not None and plain.logprobs.top_logprobs is not None
    assert all(logprob <= 0 for logprob in plain.logprobs.token_logprobs)
    for logprob, top in zip(plain.logprobs.token_logprobs, plain.logprobs.top_logprobs, strict=True):
        assert len(top) == 2 and max(top.values()) == pytest.approx(logprob, abs=1e-4), "the greedy token is the likeliest"
    assert echoed.logprobs.token_logprobs is not None and echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[-5:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-2)
    chat = demo.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    ).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    assert [len(token.top_logprobs) for token in chat.logprobs.content] == [3] * len(chat.logprobs.content)
    assert "".join(token.token for token in chat.logprobs.content).startswith(chat.message.content or "none")


def test_tokenize_and_back(demo: Server) -> None:
    text = "Hello, wörld: 三 and 🙂"
    answer = demo.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 2048
    assert demo.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = demo.http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hello"}]}).json()
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    assert demo.http.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"] == chat["count"]


def test_lightllm_routes(demo: Server) -> None:
    asked = {"inputs": "The", "parameters": {"max_new_tokens": 12, "ignore_eos": True}}
    whole = demo.http.post("/generate", json=asked).json()
    assert (whole["count_output_tokens"], whole["finish_reason"]) == (12, "length")
    with demo.http.stream("POST", "/generate_stream", json=asked) as answer:
        events = [json.loads(line[5:]) for line in answer.iter_lines() if line]
    assert "".join(event["token"]["text"] for event in events) == whole["generated_text"][0]
    assert [event["finished"] for event in events] == [False] * 11 + [True]


def test_about_the_server(demo: Server) -> None:
    for path in ("/health", "/health/ready", "/health/live", "/ping"):
        assert demo.http.get(path).json() == {"status": "ok"}
    assert demo.http.get("/version").json() == {"version": "1.0.0"}
    model = demo.http.get("/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"], model["plugin"]) == ("demo", 2048, "light-plugin-llama 1.0.0 (llama)")
    assert demo.http.get("/docs").status_code == 200
    assert {"/v1/chat/completions", "/generate"} <= set(demo.http.get("/openapi.json").json()["paths"])


def test_metrics_move(demo: Server) -> None:
    before = demo.quiet()
    answer = demo.openai.completions.create(model="demo", prompt="One two three", max_tokens=9, extra_body={"ignore_eos": True}, n=2)
    after = demo.quiet()
    assert answer.usage is not None

    def moved(name: str) -> float:
        return after[name] - before[name]

    assert moved("vllm:generation_tokens_total") == 18 == answer.usage.completion_tokens
    assert moved("vllm:request_success_total:length") == 2
    assert moved("light:engine_steps_total") >= 9
    assert moved("vllm:time_to_first_token_seconds_count") == 1 or moved("vllm:time_to_first_token_seconds_count") == 2
    assert moved("vllm:prompt_tokens_total") > 0 and moved("light:http_responses_total:200") >= 1


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 5000}, r"2048|2047"),
        ("/v1/completions", {"prompt": "word " * 4000}, r"2048"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, r"temperature.*-1"),
        ("/v1/completions", {"prompt": "x", "top_p": 2}, r"top_p.*2"),
        ("/v1/completions", {"prompt": "x", "n": 100000}, r"1 to 128, got 100000"),
        ("/v1/completions", {"prompt": [10**9]}, r"0 to \d+.*1000000000"),
        ("/v1/completions", {"prompt": "x", "logprobs": 99}, r"logprobs.*7"),
        ("/v1/completions", {"prompt": "x", "stop": [5]}, r"stop"),
        ("/v1/completions", {}, r"prompt is required"),
        ("/v1/chat/completions", {"messages": []}, r"messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, r"role"),
        ("/detokenize", {"tokens": [-1]}, r"0 to \d+"),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 0}}, r"max_new_tokens"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(demo: Server, path: str, body: dict[str, Any], words: str) -> None:
    answer = demo.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert re.search(words, error["message"]), error
    assert demo.http.get("/health").status_code == 200


def test_nonsense_does_not_hurt(demo: Server) -> None:
    post = demo.http.post
    json_type = {"Content-Type": "application/json"}
    assert post("/v1/completions", content=b"{", headers=json_type).status_code == 400
    assert post("/v1/completions", content=b"[" * 100_000, headers=json_type).status_code == 400
    assert post("/v1/completions", content=b"prompt=x").status_code == 415
    assert post("/v1/completions", json={"model": "gpt-9", "prompt": "x"}).status_code == 404
    assert demo.http.get("/v1/nothing").status_code == 404 and demo.http.get("/v1/completions").status_code == 405
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        demo.openai.completions.create(model="demo", prompt="x", max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        demo.openai.completions.create(model="gpt-9", prompt="x")
    assert demo.openai.completions.create(model="demo", prompt="x", max_tokens=2).choices[0].text is not None


# ------------------------------------------------------------------------------------------- load, on the echo family


def words_of(tokens: list[int], config: dict[str, Any]) -> list[str]:
    return [f"w{token - config['echo_first']}" for token in tokens]


def test_a_key_is_asked_for(echo: Any) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        assert httpx.get(echo.url + "/v1/models", headers=headers, timeout=FENCE_S).status_code == 401
        assert httpx.post(echo.url + "/v1/completions", json={"prompt": "w1"}, headers=headers, timeout=FENCE_S).status_code == 401
    assert httpx.get(echo.url + "/health", timeout=FENCE_S).status_code == 200, "probes have no key"
    assert KEY not in echo.log
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=echo.url + "/v1", api_key="x", max_retries=0) as client:
        client.models.list()


async def test_64_streams_do_not_mix(echo: Any) -> None:
    """More requests than the KV pool holds, with shared beginnings: every output is the one predicted, although some
    came from the prefix cache and some were put back and computed again."""
    config, first = echo.config, echo.config["echo_first"]
    # Short outputs let the length estimate expect short ones, so that the long ones below outgrow the pool.
    for number in range(24):
        echo.http.post("/v1/completions", json={"prompt": [first + number], "max_tokens": 2})
    before = echo.quiet()
    prompts = [[first + group] * 24 + [first + number, first + 2 * number] for group in range(4) for number in range(16)]

    async with openai.AsyncOpenAI(base_url=echo.url + "/v1", api_key=KEY, max_retries=0, timeout=2 * FENCE_S) as client:

        async def ask(prompt: list[int]) -> tuple[list[str], str | None]:
            words, reason = "", None
            stream = await client.completions.create(model="echo", prompt=prompt, max_tokens=60, temperature=0, stream=True)
            async for chunk in stream:
                words += chunk.choices[0].text
                reason = chunk.choices[0].finish_reason or reason
            return words.split(), reason

        answers = await asyncio.gather(*map(ask, prompts))
    for prompt, (words, reason) in zip(prompts, answers, strict=True):
        assert words == words_of(predict(prompt, 60, config), config) and reason == "length"
    after = echo.quiet()
    assert after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] > 24 * 30
    assert after["vllm:num_preemptions_total"] > before["vllm:num_preemptions_total"], "the pool was never too small"
    assert after["vllm:request_success_total:length"] - before["vllm:request_success_total:length"] == 64


async def test_several_prompts_in_one_request(echo: Any) -> None:
    config = echo.config
    prompts = [[config["echo_first"] + number] * (1 + number) for number in range(6)]
    async with openai.AsyncOpenAI(base_url=echo.url + "/v1", api_key=KEY, max_retries=0) as client:
        answer = await client.completions.create(model="echo", prompt=prompts, max_tokens=7, n=2)
    assert [choice.index for choice in answer.choices] == list(range(12))
    for index, choice in enumerate(answer.choices):
        assert choice.text.split() == words_of(predict(prompts[index // 2], 7, config), config)


# ------------------------------------------------------------------------------------------- leaving and dying


def test_disconnect_frees_kv_and_a_drain_lets_the_rest_finish(slow: Server) -> None:
    asked = {"prompt": [9, 10, 11], "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with slow.http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()  # whose end closes the connection
        next(lines)
        slow.wait_for(lambda: slow.metrics()["vllm:kv_cache_usage_perc"] > 0)  # a busy engine tells now and then
    steps = slow.metrics()["light:engine_steps_total"]
    after = slow.quiet()
    assert after["light:engine_steps_total"] - steps < 1000, "the abandoned request went on"
    assert after["vllm:request_success_total:abort"] == 1

    with slow.http.stream("POST", "/v1/completions", json=asked | {"max_tokens": 30}) as answer:
        lines = answer.iter_lines()
        read = [next(lines)]
        slow.process.send_signal(signal.SIGTERM)
        slow.wait_for(lambda: refused(slow))
        read += lines
    assert read[-2:] == ["data: [DONE]", ""] or read[-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in read if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert slow.ended() == 0, "nothing is in flight any more"
    assert "Traceback" not in slow.log and "error:" not in slow.log


def refused(server: Server) -> bool:
    try:
        return httpx.post(server.url + "/v1/completions", json={"prompt": [9], "max_tokens": 1}, timeout=FENCE_S).status_code == 503
    except httpx.TransportError:  # it has ended meanwhile
        return True


def test_death_of_the_engine_ends_the_tree(slow: Server) -> None:
    asked = {"prompt": [9, 10, 11], "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with slow.http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(slow.pids["engine"], signal.SIGKILL)
        rest = list(lines)
    assert any('"error"' in line and "the engine has stopped" in line for line in rest), rest
    assert slow.ended() == 1
    block = slow.log.rpartition("\n\n")[2].splitlines()
    assert [line.partition(":")[0] for line in block] == ["error", "cause", "try"]
    assert block[0] == "error: the engine process was killed by SIGKILL" and slow.log.count("error:") == 1
    assert "Traceback" not in slow.log


def test_on_a_terminal_with_ctrl_c(tmp_path: Path) -> None:
    """A bar and plain lines without colours; Ctrl-C ends an idle server quietly, and at once although those who ask for
    readiness would be given ten minutes: nobody has asked."""
    write_model(tmp_path / "echo", max_len=64)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [LIGHT, "serve", str(tmp_path / "echo"), *ECHO, "--device", "cpu", "--port", "0", "--drain-delay", "600"]
    server = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        shown = read_until(ours, b"try it", START_S)
        server.send_signal(signal.SIGINT)
        assert server.wait(FENCE_S) == 0
        shown += read_until(ours, b"\0", FENCE_S)
    finally:
        server.kill()
        server.wait()
        os.close(ours)
    assert b"loading weights" in shown, "there is no bar"
    assert b"Traceback" not in shown and b"\x1b" not in shown


def read_until(descriptor: int, words: bytes, timeout_s: float) -> bytes:
    data, end = b"", time.monotonic() + timeout_s
    os.set_blocking(descriptor, False)
    while words not in data and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            try:
                data += os.read(descriptor, 65536)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise
                return data  # nobody holds the other end any more
        time.sleep(0.02)
    return data


# ------------------------------------------------------------------------------------------- the other commands


def test_version_and_plugins() -> None:
    assert run("--version").stdout == "light, version 1.0.0\n"
    listed = run("plugin", "list", COLUMNS="200")
    assert listed.returncode == 0
    assert re.search(r"llama +light-plugin-llama +1\.0\.0 +llama +ok", listed.stdout)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    wrong = run("serve", "demo", "--max-model-length", "5")
    assert wrong.returncode == 2 and "--max-model-len" in wrong.stderr
    wrong = run("serf", "demo")
    assert wrong.returncode == 2 and "'serve'" in wrong.stderr


def test_generate() -> None:
    done = run("generate", "demo", "Once", "--max-tokens", "8", "--temperature", "0", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once") and len(done.stdout.strip()) > len("Once")
    assert not re.search("(?i)warning", done.stderr)


def test_chat_command(demo: Server) -> None:
    done = run("chat", "--url", demo.url, "--temperature", "0", "--max-tokens", "40", text="Hello\n\nHello again\n")
    assert done.returncode == 0, done.stderr
    answer = demo.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=40
    )
    assert (answer.choices[0].message.content or "none") in done.stdout


def test_chat_without_a_server() -> None:
    with socket.socket() as holder:  # bound, so that nobody else listens there, and not listening
        holder.bind(("127.0.0.1", 0))
        done = run("chat", "--url", f"http://127.0.0.1:{holder.getsockname()[1]}", text="Hello\n")
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()][-3:] == ["error", "cause", "try"]


def test_bench_serve(demo: Server, tmp_path: Path) -> None:
    before = demo.quiet()["vllm:generation_tokens_total"]
    written = tmp_path / "results.json"
    sizes = ("--num-prompts", "6", "--input-len", "10", "--output-len", "8", "--max-concurrency", "1,3", "--clients", "2")
    done = run("bench", "serve", "--url", demo.url, *sizes, "--json", str(written), "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 0, done.stderr
    for results in json.loads(written.read_text()):
        assert (results["completed"], results["failed"], results["total_output_tokens"]) == (6, 0, 48)
        assert 0 < results["mean_ttft_ms"] <= results["mean_e2el_ms"] and results["p99_itl_ms"] >= 0
    assert done.stdout.count("output_throughput") == 2 and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert demo.quiet()["vllm:generation_tokens_total"] - before >= 96


def test_bench_offline(tmp_path: Path) -> None:
    write_model(tmp_path / "echo", max_len=64)
    sizes = ("--num-prompts", "4", "--input-len", "10", "--output-len", "5")
    done = run("bench", "offline", str(tmp_path / "echo"), *ECHO, "--device", "cpu", *sizes)
    assert done.returncode == 0, done.stderr
    shown = dict(line.split() for line in done.stdout.splitlines())
    throughput, took = float(shown["output_throughput"].replace(",", "")), float(shown["elapsed_time"])
    assert throughput > 0 and shown["num_requests"] == "4" and took >= 0


def test_doctor(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("model: demo\nserved-model-name: demo\nport: 0\ndevice: cpu\n")
    done = run("doctor", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "light-plugin-llama 1.0.0 (llama)" in done.stdout and done.stdout.endswith("demo would start\n")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = run("doctor", "no-such-model", "--port", str(holder.getsockname()[1]))
        long = run("doctor", "demo", "--max-model-len", "9999", "--port", str(holder.getsockname()[1]))
    assert taken.returncode == 2 and "2 reason(s)" in taken.stdout, "every problem is told, not only the first"
    assert "2 reason(s)" in long.stdout and "max_model_len 9999" in long.stdout and "every one has its place" in long.stdout


def test_collect_env() -> None:
    done = run("collect-env", OMP_NUM_THREADS="1")
    assert done.returncode == 0
    for row in (r"light +1\.0\.0", r"torch +\d", r"plugin llama +light-plugin-llama 1\.0\.0", r"OMP_NUM_THREADS +1"):
        assert re.search(rf"^{row}", done.stdout, re.MULTILINE), row
