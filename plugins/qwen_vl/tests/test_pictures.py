"""The benchmark of pictures: what it sends to a server, and the folder that servers are started on."""

import base64
import importlib.util
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "pictures.py"
WAIT_S, FENCE_S = 0.02, 240
AT_A_TIME = 4
STREAMS = 3


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("pictures_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stub(ThreadingHTTPServer):
    """Answers every question after a while, and remembers it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.num_open = self.most_open = 0
        self.status = 200
        self.meeting = threading.Barrier(AT_A_TIME)
        self.num_talks = 0
        self.is_talking, self.is_shown = threading.Event(), threading.Event()
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        stub, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(body["messages"][0]["content"], str):
            return self.talk()
        with stub.lock:
            stub.asked.append(body)
            stub.num_open += 1
            stub.most_open = max(stub.most_open, stub.num_open)
        if body["max_tokens"] == 1:  # one of many: answered when as many are here as may be
            stub.meeting.wait(FENCE_S)
        if stub.num_talks:
            stub.is_talking.wait(FENCE_S)
            stub.is_shown.set()
        time.sleep(WAIT_S)
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, {"choices": [], "usage": {}}]
        with stub.lock:
            stub.num_open -= 1
        self.reply(stub.status, b"".join(map(event_bytes, events)) + b"data: [DONE]\n\n")

    def talk(self) -> None:
        """Answers words alone with three pieces. Of the second round, none ends before a picture has come."""
        stub = self.server
        with stub.lock:
            stub.num_talks += 1
            if stub.num_talks > STREAMS:
                stub.is_talking.set()
        self.send_response(200)
        self.end_headers()
        for word in "abc":
            self.wfile.write(event_bytes({"choices": [{"delta": {"content": word}}]}))
            if stub.is_talking.is_set():
                stub.is_shown.wait(FENCE_S)


def event_bytes(event: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(event).encode()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_each_picture_is_fresh_but_for_the_second_question(benchmark: Any, stub: Stub) -> None:
    url = f"http://127.0.0.1:{stub.server_port}/v1/"
    sizes = {"num_one": 3, "num_many": 2 * AT_A_TIME, "at_a_time": AT_A_TIME, "side": 32, "num_streams": STREAMS}
    one, again, many, alone, beside = benchmark.measure_server(url, "x", **sizes)
    assert [result["case"] for result in (one, again, many, alone, beside)] == ["one", "again", "many", "alone", "beside"]
    assert alone["pictures"] == 0 < beside["pictures"] and stub.num_talks == 2 * STREAMS
    assert all(0 <= words["itl_ms_p50"] <= words["itl_ms_p99"] <= words["itl_ms_max"] for words in (alone, beside))
    stub.asked = stub.asked[: -beside["pictures"]]
    for result in (one, again):
        assert WAIT_S * 1e3 <= result["ttft_ms_p50"] <= result["ttft_ms_p99"] and result["engine"] == "x"
    assert many["pictures_per_s"] == pytest.approx(8 / many["s"], rel=0.05) and many["s"] >= 2 * WAIT_S
    assert stub.most_open == AT_A_TIME
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in stub.asked]
    measured = urls[-(2 * 3 + 8) :]
    assert measured[0:6:2] == measured[1:6:2], "the second question is about the same picture"
    assert len(set(urls)) == len(urls) - 3
    questions = [body["messages"][0]["content"][1]["text"] for body in stub.asked[-14:-8]]
    assert questions[0] != questions[1] and len(set(questions)) == 2
    assert {body["max_tokens"] for body in stub.asked[-8:]} == {1}
    picture = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2])))
    assert (picture.format, picture.size) == ("JPEG", (32, 32))


def test_a_refusal_is_no_measurement(benchmark: Any, stub: Stub) -> None:
    stub.status = 400
    with pytest.raises(RuntimeError, match="400"):
        benchmark.Server(f"http://127.0.0.1:{stub.server_port}").ask("data:")


def test_the_folder_is_a_qwen2_vls(benchmark: Any, tmp_path: Path) -> None:
    benchmark.write_folder(tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (config.model_type, type(tokenizer).__name__) == ("qwen2_vl", "Qwen2Tokenizer")
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") == config.vision_start_token_id
    parts = [{"type": "image"}, {"type": "text", "text": "ab"}]
    (ids,) = tokenizer.apply_chat_template([[{"role": "user", "content": parts}]], return_dict=False)
    begin = ids.index(config.image_token_id)
    assert ids[begin + 1] == config.vision_end_token_id and tokenizer.decode(ids[begin + 2 : begin + 4]) == "ab"
