"""Pictures over HTTP: a real server with the echo family, real clients, and everything that should not get through."""

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image

from light_sdk.testing.echo import picture_values, predict, write_model

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "core/tests/media"))
from authority import Authority
from corpus import CORPUS, MAX_CPU_S, frames_url
from test_serve import ECHO, LIGHT, Server, alive

MIB = 1 << 20
COUNT = 6
LEAKS = re.compile(r"0x[0-9a-f]{4,}|/home|/root|/tmp|site-packages|Traceback|127\.0\.0\.1")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed * 7919 + width * 131 + height).randbytes(width * height * 3))


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def image_part(source: Image.Image | bytes | str) -> dict[str, Any]:
    url = source if isinstance(source, str) else data_url(source if isinstance(source, bytes) else file_of(source))
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class Host:
    """Somebody's web server, with TLS where it has a certificate: /a.png is a picture, others misbehave. Counts what it is
    asked for."""

    def __init__(self, image: bytes, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[str] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                if self.path == "/a.png":
                    self.answer(200, image)
                elif self.path == "/slow":
                    self.send_response(200)
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        while not host.stopping.wait(0.05):
                            self.wfile.write(b"x")
                elif self.path == "/private":
                    self.answer(302, b"", Location=f"http://localhost:{host.port}/a.png")
                else:
                    self.answer(302, b"", Location="/a.png")

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:  # threads shake hands, so that nobody can hold up the others
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Seeing(Server):
    """A server of the echo family that sees pictures."""

    config: dict[str, Any]
    host: Host
    tls_host: Host
    folder: Path

    def ask(self, *content: dict[str, Any], **fields: Any) -> httpx.Response:
        body = {"model": "echo", "messages": [{"role": "user", "content": list(content)}], "max_tokens": COUNT, "temperature": 0}
        body |= {"skip_special_tokens": False, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def expected(self, *parts: str | Image.Image) -> str:
        """What it says after these words and pictures."""
        tokens: list[int] = []
        for part in parts:
            if isinstance(part, str):
                tokens += [self.vocabulary.get(word, 0) for word in part.split()]
            else:
                tokens += picture_values(part.width, part.height, part.tobytes(), self.config)
        return "".join(f" {self.words[token]}" for token in predict(tokens, COUNT, self.config))

    def says(self, response: httpx.Response) -> str:
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def refuses(self, response: httpx.Response, words: str) -> None:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert re.search(words, error["message"]) and error["type"] == "invalid_request_error", error
        assert not LEAKS.search(response.text), response.text

    def tree(self) -> list[psutil.Process]:
        return [self.process_of(self.process.pid), *self.process_of(self.process.pid).children(recursive=True)]

    @staticmethod
    def process_of(pid: int) -> psutil.Process:
        return psutil.Process(pid)

    def decoders(self) -> list[psutil.Process]:
        return [process for process in self.tree() if "light_core.media.decoder" in " ".join(process.cmdline())]


def start_server(folder: Path, host: Host, tls_host: Host, authority: Authority) -> Seeing:
    config = write_model(folder / "model", echo_rule="checksum", echo_media="flat", max_len=1024, num_words=120)
    (folder / "media").mkdir()
    (folder / "media" / "b.png").write_bytes(file_of(B))
    (folder / "secret.png").write_bytes(file_of(B))
    server = Seeing(
        str(folder / "model"),
        *ECHO,
        "--dtype",
        "float32",
        "--served-model-name",
        "echo",
        "--allowed-media-domains",
        f"127.0.0.1:{host.port}",
        "--allowed-media-domains",
        f"127.0.0.1:{tls_host.port}",
        "--allowed-local-media-path",
        str(folder / "media"),
        "--media-fetch-timeout",
        "10",
        SSL_CERT_FILE=str(authority.certificate),
    )
    server.config, server.host, server.tls_host, server.folder = config, host, tls_host, folder
    vocabulary = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    server.vocabulary, server.words = vocabulary, {token: word for word, token in vocabulary.items()}
    return server


A, B, C = picture(40, 33), picture(16, 70), picture(20, 20)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Seeing]:
    authority = Authority(folder / "authority")
    host, tls_host = Host(file_of(A)), Host(file_of(B), authority.server_context("IP:127.0.0.1"))
    server = start_server(folder, host, tls_host, authority)
    try:
        yield server.ready()
    finally:
        server.close()
        host.close()
        tls_host.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeing]:
    with running(tmp_path_factory.mktemp("seeing")) as server:
        yield server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Seeing]:
    """For a test that ends it."""
    with running(tmp_path) as server:
        yield server


# ------------------------------------------------------------------------------------------- what it sees


def test_order_is_kept_over_parts_and_messages(server: Seeing) -> None:
    messages = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": [image_part(A), text_part("w2"), image_part(B), image_part(C)]},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": [text_part("w4"), image_part(A)]},
    ]
    answer = server.openai.chat.completions.create(model="echo", messages=messages, max_tokens=COUNT, temperature=0)
    seen = server.expected("system w1 user", A, "w2", B, C, "assistant w3 user w4", A, "assistant")
    assert answer.choices[0].message.content == seen
    assert answer.usage.prompt_tokens == 3 + 9 + 1 + 5 + 4 + 4 + 9 + 1


def test_a_second_question_neither_encodes_nor_prefills(server: Seeing) -> None:
    fresh = picture(64, 64, 1)
    before = server.quiet()
    own = {"cache_salt": "nobody else's"}  # not even the first word is cached
    first = server.ask(image_part(fresh), text_part("w1 w2"), **own)
    assert server.says(first) == server.expected("user", fresh, "w1 w2 assistant")
    stream = server.openai.chat.completions.create(
        model="echo",
        messages=[{"role": "user", "content": [image_part(file_of(fresh, "BMP")), text_part("w3")]}],
        max_tokens=COUNT,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=own,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == server.expected("user", fresh, "w3 assistant")
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 1 + 16
    after = server.quiet()
    assert after["light:media_asked_total"] - before["light:media_asked_total"] == 2
    grown = {name: after[name] - before[name] for name in after if name.startswith(("light:media", "vllm:iteration_tokens_total_sum"))}
    assert grown["light:media_items_total"] == 2 and grown["light:media_encoded_total"] == 1
    assert grown["light:media_decoded_total"] == 2, "another file"
    assert grown["vllm:iteration_tokens_total_sum"] == (1 + 16 + 3 + COUNT - 1) + (2 + COUNT - 1)


def test_several_outputs_of_one_picture(server: Seeing) -> None:
    answer = server.ask(image_part(A), text_part("w1"), n=3).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == [server.expected("user", A, "w1 assistant")] * 3


def test_salts_share_nothing(server: Seeing) -> None:
    fresh = picture(48, 48, 2)
    cached = [
        server.ask(image_part(fresh), cache_salt=salt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for salt in ("a", "b", "a")
    ]
    assert cached[:2] == [0, 0] and cached[2] > 9


def test_lightllms_own_api(server: Seeing) -> None:
    images = [{"type": "base64", "data": base64.b64encode(file_of(A)).decode()}, {"type": "url", "data": data_url(file_of(B))}]
    body = {"inputs": "w1 <image> w2 <image>", "parameters": {"max_new_tokens": COUNT}, "multimodal_params": {"images": images}}
    answer = server.http.post("/generate", json=body).json()
    assert answer["generated_text"] == [server.expected("w1", A, "w2", B)] and answer["prompt_tokens"] == 2 + 9 + 5
    events = server.http.post("/generate_stream", json=body).text
    assert "".join(json.loads(line[5:])["token"]["text"] for line in events.split("\n\n") if line) == server.expected("w1", A, "w2", B)
    for wrong, words in (
        ({"images": images[:1]}, "2 placeholders .* for 1 items"),
        ({"images": [{"type": "image_size", "data": [3, 3]}]}, "must be"),
        ({"images": "x"}, "must be a list"),
        ({"audios": [{}]}, "'audios' are not supported"),
    ):
        server.refuses(server.http.post("/generate", json=body | {"multimodal_params": wrong}), words)


def test_a_conversation_with_pictures_is_counted(server: Seeing) -> None:
    messages = [{"role": "user", "content": [image_part(A), text_part("w1")]}]
    assert server.http.post("/tokenize", json={"messages": messages}).json()["count"] == 1 + 9 + 2
    server.wait_for(lambda: server.metrics()["light:media_leased"] == 0)


# ------------------------------------------------------------------------------------------- where pictures come from


def test_addresses_of_the_allowed_host(server: Seeing) -> None:
    base = f"http://127.0.0.1:{server.host.port}"
    for target in ("/a.png", "/moved"):
        assert server.says(server.ask(image_part(base + target))) == server.expected("user", A, "assistant")
    asked = len(server.host.asked)
    for url in (
        f"http://localhost:{server.host.port}/a.png",
        "http://127.0.0.1:1/",
        f"http://[::1]:{server.host.port}/a.png",
        f"http://2130706433:{server.host.port}/a.png",
        f"http://evil@127.0.0.1:{server.host.port}/a.png",
        f"https://ok\\@127.0.0.1:{server.host.port}/",
        "http://169.254.169.254/latest/meta-data/",
        "gopher://127.0.0.1/",
    ):
        server.refuses(server.ask(image_part(url)), "not among|not one that is understood|give a data: URL")
    assert len(server.host.asked) == asked
    server.refuses(server.ask(image_part(f"{base}/private")), "not among")
    assert server.host.asked[asked:] == ["/private"]


def test_https_of_an_authority_that_the_operator_names(server: Seeing) -> None:
    """By SSL_CERT_FILE; what else certificates must be is tested beside `light_core.media.fetch`."""
    base = f"https://127.0.0.1:{server.tls_host.port}"
    assert server.says(server.ask(image_part(f"{base}/a.png"))) == server.expected("user", B, "assistant")
    server.refuses(server.ask(image_part(f"https://127.0.0.1:{server.host.port}/a.png")), "the address cannot be fetched$")


def test_a_slow_host_is_given_up_and_holds_nobody_up(server: Seeing) -> None:
    slow = image_part(f"http://127.0.0.1:{server.host.port}/slow")
    seen = server.expected("user", A, "w1 assistant")
    with ThreadPoolExecutor(1) as threads:
        for _ in range(5):  # the ten seconds may be over before another has its answer; not time and again
            asked = server.host.asked.count("/slow")
            waiting = threads.submit(server.ask, slow)
            server.wait_for(lambda asked=asked: server.host.asked.count("/slow") > asked)
            assert server.says(server.ask(image_part(A), text_part("w1"))) == seen
            was_waiting = not waiting.done()
            server.refuses(waiting.result(), "did not answer in 10 s")
            if was_waiting:
                break
        assert was_waiting, "others wait for it"


def test_files(server: Seeing) -> None:
    assert server.says(server.ask(image_part(f"file://{server.folder}/media/b.png"))) == server.expected("user", B, "assistant")
    for path in (
        f"{server.folder}/secret.png",
        f"{server.folder}/media/../secret.png",
        f"{server.folder}/media/%2e%2e/secret.png",
        "/etc/passwd",
    ):
        server.refuses(server.ask(image_part("file://" + path)), "no such file that may be read$")


# ------------------------------------------------------------------------------------------- what is refused


def peak_bytes(process: psutil.Process) -> int:
    """The most memory that a process has had since `forget_peak`, or ever where the system does not let us forget."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak(process: psutil.Process) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_hostile_files_cost_a_400_and_nothing_else(server: Seeing) -> None:
    server.ask(image_part(A))
    before = sum(process.memory_info().rss for process in server.tree())
    others, num_lost = [server.process_of(server.pids[role]) for role in ("http", "media")], server.log.count("is replaced: an item")
    with (
        ThreadPoolExecutor(1) as threads,
        server.http.stream(
            "POST",
            "/v1/completions",
            json={"model": "echo", "prompt": "w1 w2", "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True},
        ) as neighbour,
    ):
        for index, (name, case) in enumerate(CORPUS.items()):
            part, other = image_part(data_url(case.make(), case.media_type)), picture(20, 20, 100 + index)
            decoders = server.decoders()
            watched = [*decoders, *others]
            for process in watched:
                forget_peak(process)
            used, peaks = sum(map(cpu_s, decoders)), list(map(peak_bytes, watched))
            asked = threads.submit(server.ask, image_part(other))
            answer = server.ask(text_part("w1"), image_part(A), part)
            assert server.says(asked.result()) == server.expected("user", other, "assistant"), f"{name}: a neighbour"
            if case.words:
                server.refuses(answer, rf"^messages\[0\]\.content\[2\]\.image_url: .*({case.words})")
            else:
                assert case.shown is not None
                assert server.says(answer) == server.expected("user w1", A, case.shown(), "assistant"), name
            grown = [peak_bytes(process) - peak for process, peak in zip(watched, peaks)]
            assert max(grown) < 256 * MIB, f"{name}: {max(grown) / MIB:.0f} MiB"
            spent = sum(map(cpu_s, decoders)) - used
            assert spent < MAX_CPU_S, f"{name}: {spent:.2f} s"
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in neighbour.iter_lines() if line.startswith("data: {"))
    tokens = predict([server.vocabulary["w1"], server.vocabulary["w2"]], 900, server.config)
    assert text == "".join(f" {server.words[token]}" for token in tokens), "a neighbour"
    grown_all = sum(process.memory_info().rss for process in server.tree()) - before
    assert grown_all < 256 * MIB, f"{grown_all / MIB:.0f} MiB"
    assert server.log.count("is replaced: an item") == num_lost, "a decoder was lost"
    server.wait_for(lambda: server.metrics()["light:media_leased"] == 0)


def test_a_data_url_of_many_frames(server: Seeing) -> None:
    url, decoded = frames_url(5000), server.metrics()["light:media_decoded_total"]
    server.refuses(server.ask(image_part(url)), "not valid base64")
    server.refuses(server.ask({"type": "video_url", "video_url": {"url": url}}), ".")
    assert server.metrics()["light:media_decoded_total"] == decoded
    assert server.says(server.ask(image_part(A))) == server.expected("user", A, "assistant")


def test_odd_pictures_are_seen(server: Seeing) -> None:
    dot = picture(1, 1)
    assert server.says(server.ask(image_part(dot))) == server.expected("user", dot, "assistant")
    grey, wrong_type = C.convert("L"), data_url(file_of(C), "image/jpeg")
    assert server.says(server.ask(image_part(grey))) == server.expected("user", grey.convert("RGB"), "assistant")
    assert server.says(server.ask(image_part(wrong_type))) == server.expected("user", C, "assistant")
    shapes = [picture(48, 16, 5), Image.frombytes("RGB", (16, 48), picture(48, 16, 5).tobytes())]
    for shape in shapes:
        assert server.says(server.ask(image_part(shape))) == server.expected("user", shape, "assistant")


def test_a_picture_that_plugin_or_encoder_cannot_do(server: Seeing) -> None:
    magenta, green = A.copy(), A.copy()
    magenta.putpixel((0, 0), (255, 0, 255))
    green.putpixel((0, 0), (0, 255, 0))
    server.refuses(server.ask(image_part(green)), "cannot be preprocessed for this model")
    server.refuses(server.ask(image_part(magenta)), "cannot be encoded by this model")
    part = image_part(A)
    part["image_url"]["detail"] = "low"
    assert server.says(server.ask(part)) == server.expected("user", A, "assistant")
    assert server.says(server.ask(image_part(A))) == server.expected("user", A, "assistant")


def test_a_thousand_pictures(server: Seeing) -> None:
    before = server.metrics()["light:media_asked_total"]
    server.refuses(server.ask(*[image_part(B)] * 1000), "1000 items; a request may have 32")
    assert server.metrics()["light:media_asked_total"] == before, "none of them was looked at"
    server.refuses(server.ask(*[image_part(picture(160, 160))] * 32), "limit is 1024 tokens")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url"},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": 5}},
        {"type": "image_url", "image_url": {"url": ""}},
        {"type": "image_url", "image_url": ["data:"]},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}},
        {"type": "image_url", "image_url": {"url": "data:image/png,x"}},
        {"type": "image_url", "image_url": {"url": "data:\ud800"}},
        {"type": "image_url", "image_url": {"url": "data:;base64,AAAA", "detail": "bogus"}},
        {"type": "image_url", "image_url": {"url": "data:;base64,AAAA", "detail": 3}},
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "input_audio", "input_audio": {"data": "x"}},
    ],
)
def test_parts_that_are_none(server: Seeing, part: Any) -> None:
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": [part]}]})
    server.refuses(server.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}), ".")


@pytest.mark.parametrize("token", ["<image>", "<s>", "</s>", "<unk>", "<pad>"])
def test_special_tokens_as_text(server: Seeing, token: str) -> None:
    for count in (1, 800):
        for content in ([text_part(token * count)], [text_part(token * count), image_part(C)]):
            assert server.ask(*content).status_code in (200, 400)
        body = {"model": "echo", "prompt": f"w1 {token * count}", "max_tokens": 1}
        assert server.http.post("/v1/completions", json=body).status_code == (400 if token == "<image>" else 200)
    words = server.vocabulary
    ids = {"model": "echo", "prompt": [words["w1"], words["<image>"]], "max_tokens": 1}
    server.refuses(server.http.post("/v1/completions", json=ids), "1 placeholders")
    said = server.says(server.ask(text_part(f"w1 {token} w2"), image_part(C)))
    assert said == server.expected(f"user w1 {token[0]} {token[1:]} w2", C, "assistant"), "it is text"


def test_prompt_logprobs_are_not_there_for_pictures(server: Seeing) -> None:
    server.refuses(server.ask(image_part(A), prompt_logprobs=1), "in no vocabulary")
    assert server.ask(text_part("w1"), prompt_logprobs=1).status_code == 200


def test_clients_that_go_leave_nothing(server: Seeing) -> None:
    slow = {"model": "echo", "messages": [{"role": "user", "content": [image_part(f"http://127.0.0.1:{server.host.port}/slow")]}]}
    long = {
        "model": "echo",
        "messages": [{"role": "user", "content": [image_part(A)]}],
        "max_tokens": 1000,
        "ignore_eos": True,
        "stream": True,
    }
    for body in (slow, long) * 3:
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + data)
            time.sleep(0.05)
    for fields in ({"max_tokens": 5000}, {"n": 5000}, {"logit_bias": {"99999": 1}}):
        assert server.ask(image_part(A), **fields).status_code == 400
    server.wait_for(lambda: server.quiet()["light:media_leased"] == 0)
    assert server.says(server.ask(image_part(A))) == server.expected("user", A, "assistant")


def test_the_terminal_shows_pictures_too(server: Seeing) -> None:
    command = [LIGHT, "chat", "--url", server.url, "--image", str(server.folder / "media" / "b.png"), "--max-tokens", str(COUNT)]
    ended = subprocess.run([*command, "--temperature", "0"], input="w1\n", capture_output=True, text=True, timeout=240)
    said = server.expected("user", B, "w1 assistant").replace(" <image>", "")
    assert ended.returncode == 0 and ended.stdout.replace("> ", "").strip() == said.strip()


def test_a_lost_decoder_is_replaced(server: Seeing) -> None:
    for process in server.decoders():
        os.kill(process.pid, signal.SIGKILL)
    fresh = picture(30, 30, 9)
    answers = [server.ask(image_part(fresh)) for _ in range(8)]
    assert {answer.status_code for answer in answers} <= {200, 400} and answers[-1].status_code == 200
    server.wait_for(lambda: "is replaced: an item" in server.log)


# ------------------------------------------------------------------------------------------- processes


def test_a_restart_of_http_voids_leases_and_the_end_of_media_ends_all(own_server: Seeing) -> None:
    server = own_server
    messages = [{"role": "user", "content": [image_part(A)]}]
    extra = {"ignore_eos": True}
    stream = server.openai.chat.completions.create(model="echo", messages=messages, max_tokens=900, stream=True, extra_body=extra)
    next(iter(stream))
    os.kill(server.pids["http"], signal.SIGKILL)
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        list(stream)

    def again() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return server.http.get("/health").status_code == 200
        return False

    server.wait_for(again)
    assert server.says(server.ask(image_part(A))) == server.expected("user", A, "assistant")
    server.wait_for(lambda: server.quiet()["light:media_leased"] == 0)
    pids = [process.pid for process in server.tree()]
    os.kill(server.pids["media"], signal.SIGKILL)
    assert server.ended() != 0
    assert "the media process was killed by SIGKILL" in server.log
    server.wait_for(lambda: not any(alive(pid) for pid in pids))
