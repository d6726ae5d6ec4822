"""A real server in a thread, around the stub engine and a tokenizer that is built here; nothing needs the network."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from light_core.server.app import context_of, create_app
from light_core.server.serve import serve
from light_core.server.settings import ServerSettings
from light_core.server.stub import StubEngine
from light_core.text.tokenizer import Tokenizer, load_tokenizer

FENCE_S = 240.0
"""After which what should happen at once has failed to."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if shout %}LOUD{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def short_turns() -> Iterator[None]:
    """Client and server are threads of one interpreter here: with the usual turns of 5 ms each answer would take 10 ms."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template, as a model folder has it."""
    folder = tmp_path_factory.mktemp("model")
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rust.train_from_iterator(["hello world, the quick brown fox"] * 4, trainer)
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)
    hf.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "temperature": 0.6, "top_p": 0.9, "max_length": 9}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


class RunningServer:
    """A server on a free port, in a thread of its own."""

    def __init__(self, engine: StubEngine, tokenizer: Tokenizer | None, settings: ServerSettings, prepare: Any = None) -> None:
        self.engine, self.settings = engine, settings
        self.app = create_app(engine, tokenizer, settings)
        self.context = context_of(self.app)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.error: BaseException | None = None
        self._up = threading.Event()
        self._prepare = prepare
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._up.wait(FENCE_S)
        self.http = httpx.Client(base_url=self.url, timeout=FENCE_S)

    def _run(self) -> None:
        async def main() -> None:
            self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
            self._up.set()
            await serve(self.app, [self.listener], prepare=self._prepare, stopping=self.stopping, handle_signals=False)

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        except BaseException as error:
            self.error = error

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "tiny", "prompt": prompt, **fields})

    def chat(self, content: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
        )

    def call(self, work: Callable[[], Any]) -> None:
        """Runs `work` on the server's event loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (work(), done.set()))
        assert done.wait(FENCE_S)

    def raw(self, data: bytes) -> bytes:
        """What the server answers to these bytes until it closes the connection; a `TimeoutError` if it does neither."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=FENCE_S) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(data)
            while part := connection.recv(65536):
                answer += part
        return answer

    def stop(self) -> None:
        self.http.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopping.set)
        self._thread.join(FENCE_S)
        assert not self._thread.is_alive()
        self.listener.close()


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, "[DONE]" as a string; checks that each is one `data:` line."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


@pytest.fixture(scope="session")
def read_events() -> Callable[[httpx.Response], list[Any]]:
    return events


@pytest.fixture(scope="module")
def start(tokenizer: Tokenizer) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers; they stop with the module."""
    running: list[RunningServer] = []

    def start(
        engine: StubEngine | None = None,
        *,
        no_tokenizer: bool = False,
        served: Tokenizer | None = None,
        prepare: Any = None,
        **settings: Any,
    ) -> RunningServer:
        own = None if no_tokenizer else served or tokenizer
        patient = {"drain_delay_s": 0.0, "template_timeout_s": 600.0, "header_timeout_s": 600.0}
        settings = {"served_model_names": ("tiny", "alias"), **patient, **settings}
        server = RunningServer(engine or StubEngine(own, max_model_len=512), own, ServerSettings(**settings), prepare)
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server(start: Callable[..., RunningServer]) -> RunningServer:
    """One with the default settings."""
    return start()
