"""Pictures through the engine, with the echo family: what it says depends on every pixel, so outputs tell whether the right
embeddings stood in the right places; and counters tell what was encoded and prefilled."""

import base64
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from light_core import LLM, SamplingParams
from light_core.cli.main import command
from light_core.config import EngineConfig
from light_core.engine.engine import Engine
from light_core.engine.media import TokenIds
from light_core.engine.requests import EngineRequest, MediaItem
from light_core.errors import LightError, RequestError
from light_core.types import MediaSpan
from light_sdk.testing.echo import picture_values, predict, write_model

PLUGIN = "light_sdk.testing.echo"
MAGENTA, GREEN = (255, 0, 255), (0, 255, 0)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
Part = str | Image.Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed * 1_000_003 + width * 1009 + height).randbytes(width * height * 3))


A, B, C = picture(40, 33), picture(16, 70), picture(20, 20)
"""9, 5 and 4 tokens."""


class Model:
    """A tiny model with pictures, what it is asked and what it must say."""

    def __init__(self, folder: Path, media: str | None, **options: Any) -> None:
        self.config = write_model(folder, echo_rule="checksum", echo_media=media, max_len=256, num_words=100)
        defaults = {"device": "cpu", "dtype": "float32", "max_num_batched_tokens": 16, "max_num_seqs": 4}
        self.llm = LLM(str(folder), model_plugin=PLUGIN, **defaults | options)

    def prompt(self, *parts: Part) -> dict[str, Any]:
        """Words and pictures, in order, as the offline API takes them."""
        text = " ".join(part if isinstance(part, str) else "<image>" for part in parts)
        return {"prompt": text, "multi_modal_data": {"image": [part for part in parts if not isinstance(part, str)]}}

    def expected(self, *parts: Part, count: int = 6) -> list[int]:
        """What follows them."""
        tokens: list[int] = []
        spans: list[MediaSpan] = []
        for part in parts:
            if isinstance(part, str):
                tokens += self.llm.tokenizer.encode(part)
                continue
            values = picture_values(part.width, part.height, part.tobytes(), self.config)
            spans.append(MediaSpan(len(tokens), len(values), "image", (1, -(-part.height // 16), -(-part.width // 16))))
            tokens += values
        return predict(tokens, count, self.config, spans)

    def say(self, *prompts: Sequence[Part], params: SamplingParams = GREEDY) -> list[list[int]]:
        outputs = self.llm.generate([self.prompt(*parts) for parts in prompts], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def check(self, *prompts: Sequence[Part]) -> None:
        """Says what it must, to all of them at a time."""
        assert self.say(*prompts) == [self.expected(*parts) for parts in prompts]
        media = self.llm.engine.media
        assert media is None or not (media.has_pins or media.num_waiting)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Items, encoded items, and tokens that steps have computed."""
        stats = self.llm.engine.stats()
        return stats.media_items, stats.media_encoded, stats.batched_tokens


@pytest.fixture
def create(tmp_path: Path) -> Iterator[Callable[..., Model]]:
    made: list[Model] = []

    def one(media: str | None = "flat", **options: Any) -> Model:
        made.append(Model(tmp_path / str(len(made)), media, **options))
        return made[-1]

    yield one
    for model in made:
        model.llm.shutdown()


CONVERSATIONS: tuple[tuple[Part, ...], ...] = (
    ("w1 w2", A, "w3", B, "w4"),
    ("w9",),
    (A, B, C),
    ("w1 w2", A, "w3", C),
    (C, "w5 w6 w7 w8"),
    ("w1 w2", B, A),
)


@pytest.mark.parametrize("media", ["flat", "grid"])
@pytest.mark.parametrize("budget", [4, 7, 64])
def test_every_pixel_counts_however_prompts_are_cut(create: Callable[..., Model], media: str, budget: int) -> None:
    model = create(media, max_num_batched_tokens=budget)
    model.check(*CONVERSATIONS)
    model.check(*CONVERSATIONS[::-1])
    assert model.counts[1] == 3, "three pictures, each encoded once"


@pytest.mark.parametrize("media", ["flat", "grid"])
def test_a_step_ahead_of_the_host(create: Callable[..., Model], media: str) -> None:
    create(media, async_planning=True).check(*CONVERSATIONS)


def test_a_second_question_about_a_picture_encodes_and_prefills_nothing_of_it(create: Callable[..., Model]) -> None:
    model = create(max_num_batched_tokens=64)
    model.check(("w1 w2", A, "w3"))
    assert model.counts[:2] == (1, 1)
    before = model.counts[2]
    output = model.llm.generate(model.prompt("w1 w2", A, "w4 w5"), GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == model.expected("w1 w2", A, "w4 w5")
    assert output.num_cached_tokens == 2 + 9
    assert model.counts[1] == 1, "it is encoded again"
    assert model.counts[2] - before == 2 + 5, "two new prompt tokens, and five outputs that are read again"


def test_without_embeddings_a_cached_prefix_still_needs_none(create: Callable[..., Model]) -> None:
    model = create(media_cache_bytes=0, max_num_batched_tokens=64)
    model.check(("w1", A, "w3"))
    model.check(("w1", A, "w4"))
    assert model.counts[:2] == (2, 1)
    model.check(("w2", A, "w4"))
    assert model.counts[:2] == (3, 2), "in another place it has to be prefilled, and so encoded"


def test_embeddings_are_shared_between_places_and_files(create: Callable[..., Model]) -> None:
    model = create()
    file = io.BytesIO()
    A.save(file, "BMP")
    model.check(("w1", A, "w3"), ("w2", A, A))
    again = model.llm.generate({"prompt": "w1 <image> w3", "multi_modal_data": {"image": file.getvalue()}}, GREEDY, use_tqdm=False)
    assert again[0].outputs[0].token_ids == model.expected("w1", A, "w3")
    assert model.counts[:2] == (4, 1)


def test_another_picture_of_the_same_size_is_another_picture(create: Callable[..., Model]) -> None:
    model = create()
    other = A.copy()
    other.putpixel((39, 32), tuple(255 - value for value in A.getpixel((39, 32))))
    model.check(("w1", A, "w3"))
    model.check(("w1", other, "w3"))
    turned = Image.frombytes("RGB", (33, 40), A.tobytes())  # the same bytes in another shape
    model.check(("w1", turned, "w3"))
    assert model.counts[1] == 3


@pytest.mark.parametrize("media", ["flat", "grid"])
def test_preempted_requests_say_the_same(create: Callable[..., Model], media: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(media, max_total_tokens=256, max_num_seqs=16, media_cache_bytes=100, max_num_batched_tokens=32)
    prompts = [(f"w{index}", picture(33, 48, index), f"w{index + 1}", picture(16, 16, index)) for index in range(16)]
    monkeypatch.setattr(model.llm.engine.scheduler._admission, "admits", lambda row, held: True)  # far too many
    params = GREEDY.replace(max_tokens=40)
    expected = [model.expected(*parts, count=40) for parts in prompts]
    assert model.say(*prompts, params=params) == expected
    assert model.llm.engine.stats().preemptions > 0
    assert model.llm.engine.media is not None and model.llm.engine.media._cache.used <= 100


def test_an_encoder_that_fails_takes_nobody_along(create: Callable[..., Model]) -> None:
    model = create(max_num_batched_tokens=64)
    bad = A.copy()
    bad.putpixel((0, 0), MAGENTA)
    prompts = [("w1", A), ("w1", bad), ("w2", B, bad, C), ("w3 w4",), ("w5", C)]
    outputs = model.llm.generate([model.prompt(*parts) for parts in prompts], GREEDY, use_tqdm=False)
    for parts, output in zip(prompts, outputs, strict=True):
        found = output.outputs[0]
        if bad in parts:
            assert (found.finish_reason, found.token_ids) == ("error", [])
            assert found.error == "an item of the request cannot be encoded by this model"
        else:
            assert found.token_ids == model.expected(*parts)
    assert model.llm.engine.stats().finished == {"error": 2, "length": 3}
    model.check(("w1", A), ("w2", B, C))


def test_conversations(create: Callable[..., Model]) -> None:
    model = create()
    file = io.BytesIO()
    B.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "text", "text": "w1 <image>"},
        {"type": "image", "image": A},
        {"type": "text", "text": "w2"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    output = model.llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == model.expected("user w1 < image>", A, "w2", B, "assistant")
    assert output.prompt_token_ids.count(model.config["vocab_size"] - 1) == 9 + 5, "placeholders, within the vocabulary"


def test_prompts_of_token_ids(create: Callable[..., Model]) -> None:
    model = create(skip_tokenizer_init=True)
    image_token = model.config["vocab_size"] - 1
    prompt = {"prompt_token_ids": [10, image_token, 11], "multi_modal_data": {"image": A}}
    output = model.llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    values = picture_values(A.width, A.height, A.tobytes(), model.config)
    assert output.outputs[0].token_ids == predict([10, *values, 11], 6, model.config)


def test_what_cannot_be_is_refused_and_changes_nothing(create: Callable[..., Model]) -> None:
    model = create()
    logprobs = GREEDY.replace(prompt_logprobs=1)
    for prompt, params, words in (
        (model.prompt("w1", A) | {"prompt": "w1"}, GREEDY, "0 placeholders .* for 1 items"),
        ({"prompt": "w1 <image>"}, GREEDY, "1 placeholders .* for 0 items"),
        ({"prompt": "w1", "multi_modal_data": {"audio": b""}}, GREEDY, "this model takes text, image"),
        ({"prompt": "<image>", "multi_modal_data": {"image": "/etc/passwd"}}, GREEDY, "give a PIL image"),
        ({"prompt": "<image>", "multi_modal_data": {"image": b"x"}}, GREEDY, "no image"),
        (model.prompt("w1", picture(256, 256)), GREEDY, "leaves no room"),
        (model.prompt("w1", A), logprobs, "in no vocabulary"),
    ):
        with pytest.raises(RequestError, match=words):
            model.llm.generate(prompt, params, use_tqdm=False)
    model.check(("w1", A))
    with pytest.raises(RequestError, match="takes text"):
        create(None).llm.generate(model.prompt("w1", A), GREEDY, use_tqdm=False)


def test_the_command_line(create: Callable[..., Model], tmp_path: Path) -> None:
    model = create()
    B.save(tmp_path / "b.png")
    arguments = ["generate", str(tmp_path / "0"), "w1 <image> w2", "--image", str(tmp_path / "b.png"), "--model-plugin", PLUGIN]
    result = CliRunner().invoke(command, [*arguments, "--max-tokens", "6", "--temperature", "0", "--device", "cpu"])
    said = [token for token in model.expected("w1", B, "w2") if token != model.config["vocab_size"] - 1]
    assert result.exit_code == 0 and result.stdout.endswith("w1 <image> w2 " + model.llm.tokenizer.decode(said).strip() + "\n\n")


def test_a_sampled_penalty_does_not_mind_media_ids(create: Callable[..., Model]) -> None:
    model = create()
    params = SamplingParams(max_tokens=4, temperature=0.7, repetition_penalty=1.2, presence_penalty=0.5, seed=3)
    assert len(model.say(("w1", A, "w2"), params=params)[0]) == 4


# ------------------------------------------------------------------------------------------- the engine itself


def engine_request(model: Model, request_id: int, *images: Image.Image, start: int = 1, count: int | None = None) -> EngineRequest:
    """A request for `images` one after the other from `start`, made without the offline API."""
    from light_core.media.pixels import image_pixels

    encoder = model.llm.engine.runtime.media_encoders[0]
    items, end = [], start
    for image in images:
        pixels = image_pixels(image)
        tensors = encoder.preprocess(pixels.ppm)
        span = MediaSpan(end, encoder.num_tokens(tensors) if count is None else count, "image")
        items.append(MediaItem(span, pixels.digest, tensors))
        end += span.num_tokens
    prompt = np.full(end + 1, 10, np.int32)
    return EngineRequest(request_id, prompt, GREEDY, media=tuple(items))


def test_spans_are_checked(create: Callable[..., Model]) -> None:
    model = create()
    engine = model.llm.engine
    good = engine_request(model, 1, A, B)
    wrong = [
        (good.media[::-1], "one after the other"),
        ((MediaItem(MediaSpan(0, 99, "image"), b"k", {}),), "one after the other"),
        ((MediaItem(MediaSpan(0, 0, "image"), b"k", {}),), "one after the other"),
        ((MediaItem(MediaSpan(0, 1, "sound"), b"k", {}),), "no encoder 'sound'"),
    ]
    for media, words in wrong:
        with pytest.raises(RequestError, match=words):
            engine.add(EngineRequest(1, good.prompt, GREEDY, media=media))
    assert not engine.has_work()


def test_a_count_that_the_encoder_does_not_keep_ends_that_request_alone(create: Callable[..., Model]) -> None:
    model = create()
    engine = model.llm.engine
    engine.add(engine_request(model, 1, A, count=8))
    engine.add(engine_request(model, 2, B))
    ended = {}
    while engine.has_work():
        ended |= {update.request_id: update for update in engine.step() if update.finish_reason}
    assert (ended[1].finish_reason, ended[1].param) == ("error", "") and ended[2].finish_reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_leaves_nothing(create: Callable[..., Model], steps: int) -> None:
    model = create(max_num_batched_tokens=4)
    engine = model.llm.engine
    engine.add(engine_request(model, 1, A, B))
    assert engine.has_work() and engine.stats().num_requests_waiting == 1
    for _ in range(steps):
        engine.step()
    engine.abort(1)
    engine.drain()
    assert not engine.has_work() and engine.media is not None and not engine.media.has_pins
    assert engine.stats().kv_slots_used == 0 and engine.stats().finished == {"abort": 1}
    model.check(("w1", A, B))


def test_embeddings_that_wait_are_bounded(create: Callable[..., Model]) -> None:
    # 9 tokens of 4 bytes a picture: two requests' embeddings fit at a time, and all get their turn.
    model = create(media_cache_bytes=80, max_num_batched_tokens=9, max_num_seqs=2, enable_prefix_caching=False)
    prompts = [("w1", picture(40, 33, index)) for index in range(8)]
    engine, most = model.llm.engine, 0
    assert engine.media is not None
    encode = engine.media._encode

    def watched(batch: Any) -> Any:
        nonlocal most
        made = encode(batch)
        most = max(most, engine.media._cache.used)
        return made

    engine.media._encode = watched
    model.check(*prompts)
    assert 0 < most <= 3 * 36, "one more than fits, while it is being made"


@pytest.mark.parametrize("decodes", [False, True])
def test_who_decodes_waits_for_a_part_of_the_pictures_at_a_time(create: Callable[..., Model], decodes: bool) -> None:
    """Half of a step's tokens are encoded before it, or one picture that has more; all of them where nobody waits."""
    model = create(max_num_batched_tokens=64, max_num_seqs=16, enable_prefix_caching=False)
    engine = model.llm.engine
    assert engine.media is not None
    encode, encoded = engine.media._encode, []

    def watched(batch: Any) -> Any:
        encoded.append([item.span.num_tokens for item in batch.values()])
        return encode(batch)

    engine.media._encode = watched
    if decodes:
        engine.add(EngineRequest(100, np.array([1], np.int32), GREEDY.replace(max_tokens=40)))
        engine.step()
    pictures = [[picture(40, 33, index)] for index in range(6)]  # 9 tokens each
    pictures += [[picture(96, 96)], [picture(16, 70, 1), picture(16, 70, 2), picture(20, 20)]]  # 36; 5, 5 and 4
    for request_id, some in enumerate(pictures):
        request = engine_request(model, request_id, *some)
        engine.add(replace(request, params=GREEDY.replace(max_tokens=1)))
    while engine.media.num_waiting:
        told = {update.request_id for update in engine.step() if update.token_ids}
        assert not decodes or 100 in told, "a decode that others' pictures stop"
    limit = 32 if decodes else 64
    assert all(sum(batch) <= limit or len(batch) == 1 for batch in encoded), encoded
    assert max(map(len, encoded)) == (4 if decodes else 8) and len(encoded) == (4 if decodes else 2), encoded
    assert sorted(count for batch in encoded for count in batch) == [4, 5, 5, *[9] * 6, 36]
    while engine.has_work():
        engine.step()


def test_a_failing_step_forgets_media_too(create: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(max_num_batched_tokens=8)
    engine = model.llm.engine
    engine.add(engine_request(model, 1, A, B))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "_hidden", lambda step, wanted: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            for _ in range(3):
                engine.step()
    assert not engine.has_work() and engine.media is not None and not engine.media.has_pins
    model.check(("w1", A, B))


# ------------------------------------------------------------------------------------------- ids


def test_ids_are_given_once() -> None:
    ids = TokenIds(100)
    a, b, c = (("image", bytes([index]) * 32) for index in range(3))
    assert ids.assign([(a, 5), (b, 3), (a, 5)]) == [100, 105, 100]
    assert ids.assign([(c, 2), (b, 3)]) == [108, 105]
    assert ids.assign([(("other", a[1]), 5)]) == [110], "another encoder's"
    assert ids.salt("tenant") == "tenant"


def test_ids_that_run_out_begin_anew_apart() -> None:
    ids = TokenIds(100, last=109)
    a, b, c = (("image", bytes([index]) * 32) for index in range(3))
    assert ids.assign([(a, 6)]) == [100]
    assert ids.assign([(b, 4)]) == [106] and ids.epoch == 0
    assert ids.assign([(a, 6), (c, 4)]) == [100, 106] and ids.epoch == 1, "all of a request in one epoch"
    assert ids.salt("tenant") != "tenant" and ids.salt("") not in ("", ids.salt("tenant"))
    with pytest.raises(UnicodeEncodeError):
        ids.salt("tenant").encode()  # no client can send it


def test_forgotten_contents_get_new_ids() -> None:
    ids = TokenIds(100, max_contents=2)
    a, b, c = (("image", bytes([index]) * 32) for index in range(3))
    assert ids.assign([(a, 1), (b, 1)]) == [100, 101]
    assert ids.assign([(a, 1), (c, 1)]) == [100, 102]
    assert ids.assign([(b, 1)]) == [103] and ids.epoch == 0


def test_outputs_do_not_mind_ids_that_begin_anew(create: Callable[..., Model]) -> None:
    model = create()
    media = model.llm.engine.media
    assert media is not None
    media._ids = TokenIds(model.config["vocab_size"], last=model.config["vocab_size"] + 29)
    for seed in range(12):
        model.check(("w1", picture(40, 33, seed), "w2"), ("w1", picture(40, 33, seed % 2), "w2"))
    assert media._ids.epoch > 3


def test_an_encoder_that_nothing_stands_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from light_sdk.testing import echo_model

    create = echo_model.create_encoder
    monkeypatch.setattr(echo_model, "create_encoder", lambda model: replace(create(model), placeholder="", token_id=None))
    write_model(tmp_path, echo_media="flat")
    with pytest.raises(LightError, match=r"'image' cannot be used.*neither a placeholder nor a token id"):
        Engine(EngineConfig(model=str(tmp_path), model_plugin=PLUGIN, device="cpu", skip_tokenizer_init=True))


# ------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("media", ["flat", "grid"])
@pytest.mark.parametrize("eager", [True, False])
def test_on_a_gpu(create: Callable[..., Model], media: str, eager: bool) -> None:
    model = create(media, device="cuda", enforce_eager=eager, max_num_seqs=8, max_num_batched_tokens=16, gpu_memory_utilization=0.3)
    model.check(*CONVERSATIONS)
    model.check(*CONVERSATIONS[::-1])
    assert model.counts[1] == 3
    prompts = [(f"w{index}", picture(33, 48, index), f"w{index + 1}") for index in range(20)]
    expected = [model.expected(*parts, count=60) for parts in prompts]
    assert model.say(*prompts, params=GREEDY.replace(max_tokens=60)) == expected
    assert torch.cuda.is_available()
