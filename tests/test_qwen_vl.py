"""Qwen2-VL, Qwen2.5-VL and Qwen-VL through the engine and over HTTP: pictures, positions of three axes, conversations."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from light_core import LLM, SamplingParams
from light_core.config import EngineConfig
from light_core.engine.loading import bind_model, resolve_model
from light_core.errors import CheckpointError, RequestError
from light_qwen.tokenizer import load_tokenizer
from light_qwen_vl.tokenizer import add_image_tokens
from light_sdk import MediaTokens
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model

sys.path.insert(0, str(Path(__file__).parent))
from control_tokens import check_control_tokens

LIGHT = str(Path(sys.executable).with_name("light"))
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCAB, NUM_OUTPUT, START_S = 120, 8, 180
IDS = {token: 100 + index for index, token in enumerate(SPECIAL)}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
NAMES = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
EYES = {"depth": 2, "num_heads": 4}
CONFIGS = {
    "qwen2-vl": Qwen2VLConfig(text_config=TEXT, vision_config=EYES | {"embed_dim": 32, "hidden_size": 64}, **NAMES),
    "qwen2.5-vl": Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=EYES
        | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 42, "window_size": 56, "fullatt_block_indexes": [1]},
        **NAMES,
    ),
}
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)


def draw(width, height, colour):
    """Slopes and a disc."""
    slope = Image.linear_gradient("L").resize((width, height))
    picture = Image.merge("RGB", (slope, slope.transpose(Image.Transpose.FLIP_LEFT_RIGHT), slope))
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), fill=colour)
    return picture


FIRST, SECOND = draw(150, 80, (250, 30, 40)), draw(60, 140, (20, 60, 240))


def data_url(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(name, folder):
    """A tiny random checkpoint with a tokenizer of words, and transformers' model of it."""
    source = create_model(CONFIGS[name], factory=AutoModelForImageTextToText)
    source.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return source


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write(request.param, folder)


@pytest.fixture(scope="module")
def llm(checkpoint):
    """Chunks of 16 tokens, so that pictures are cut."""
    llm = LLM(str(checkpoint[0]), model_plugin="qwen_vl", dtype="float32", device="cpu", max_num_batched_tokens=16, max_num_seqs=4)
    yield llm
    llm.shutdown()


def greedy(source, prompt, pictures):
    """transformers' own pixels, positions and output; `prompt` has -1 for each picture."""
    pixels = dict(Qwen2VLImageProcessorPil()(images=pictures, return_tensors="pt")) if pictures else {}
    counts = iter((pixels["image_grid_thw"].prod(-1) // 4).tolist() if pictures else ())
    image = IDS["<|image_pad|>"]
    ids = [token for entry in prompt for token in ([image] * next(counts) if entry == -1 else [entry])]
    if pictures:
        pixels["mm_token_type_ids"] = (torch.tensor([ids]) == image).int()
    source.model.rope_deltas = None  # of the prompt before
    tokens, past, output = torch.tensor([ids]), None, []
    with torch.inference_mode():
        for _ in range(NUM_OUTPUT):
            found = source(input_ids=tokens, past_key_values=past, use_cache=True, **pixels)
            past, tokens, pixels = found.past_key_values, found.logits[:, -1:].argmax(-1), {}
            output.append(int(tokens))
    return ids, output


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PICTURE_IDS = [IDS["<|vision_start|>"], -1, IDS["<|vision_end|>"]]


def test_pictures_in_a_prompt_give_transformers_output(checkpoint, llm):
    """Two pictures cut by chunks, whose positions generated tokens go on from."""
    ids, expected = greedy(checkpoint[1], [5, 6, *PICTURE_IDS, 7, 9, *PICTURE_IDS, 8], [FIRST, SECOND])
    inputs = {"prompt": f"w5 w6 {PICTURE} w7 w9 {PICTURE} w8", "multi_modal_data": {"image": [FIRST, SECOND]}}
    (result,) = llm.generate([inputs], PARAMS, use_tqdm=False)
    assert result.prompt_token_ids == ids and result.outputs[0].token_ids == expected


def test_pictures_and_text_beside_each_other(checkpoint, llm):
    """In one batch: each request adds to its positions what its own pictures took."""
    inputs = [
        {"prompt": f"w5 w6 {PICTURE} w7", "multi_modal_data": {"image": SECOND}},
        {"prompt": f"w5 w6 {PICTURE} w9", "multi_modal_data": {"image": FIRST}},
        "w5 w6 w7",
    ]
    prompts = [[5, 6, *PICTURE_IDS, 7], [5, 6, *PICTURE_IDS, 9], [5, 6, 7]]
    results = llm.generate(inputs, PARAMS, use_tqdm=False)
    for result, prompt, pictures in zip(results, prompts, ([SECOND], [FIRST], []), strict=True):
        assert result.outputs[0].token_ids == greedy(checkpoint[1], prompt, pictures)[1]


def test_a_second_question_about_a_picture_encodes_and_prefills_nothing_of_it(checkpoint, llm):
    picture = draw(90, 90, (200, 200, 20))
    before, seen = llm.engine.stats(), []
    for question in ([7], [8, 3]):
        inputs = {"prompt": f"w5 {PICTURE} " + " ".join(f"w{word}" for word in question), "multi_modal_data": {"image": picture}}
        (result,) = llm.generate([inputs], PARAMS, use_tqdm=False)
        assert result.outputs[0].token_ids == greedy(checkpoint[1], [5, *PICTURE_IDS, *question], [picture])[1]
        seen.append(llm.engine.stats())
    assert [stats.media_encoded - before.media_encoded for stats in seen] == [1, 1]
    shared = result.prompt_token_ids.index(IDS["<|vision_end|>"]) + 1
    assert seen[1].prefix_cache_hits - seen[0].prefix_cache_hits == shared


def test_a_conversation_with_pictures_has_the_models_form(checkpoint, llm):
    parts = [{"type": "image_url", "image_url": {"url": data_url(FIRST)}}, {"type": "text", "text": "w7 <|image_pad|> w8"}]
    (result,) = llm.chat([{"role": "user", "content": parts}], PARAMS, use_tqdm=False)
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert result.prompt.replace("\ufdd0", "") == f"{begin}{PICTURE}w7 <|image_pad|> w8<|im_end|>\n<|im_start|>assistant\n"
    assert result.prompt_token_ids.count(IDS["<|image_pad|>"]) == 15, "what a client writes is no placeholder"


def test_as_many_pictures_as_placeholders(llm):
    with pytest.raises(RequestError):
        llm.generate([{"prompt": f"w5 {PICTURE} {PICTURE}", "multi_modal_data": {"image": FIRST}}], PARAMS, use_tqdm=False)


def test_served_over_http(tmp_path):
    """A real server, asked through the real openai package: a conversation with two pictures, plain and streamed; control tokens
    in what a client writes."""
    source, log = write("qwen2-vl", tmp_path), tmp_path / "server.log"
    arguments = ["--model-plugin", "qwen_vl", "--device", "cpu", "--dtype", "float32", "--port", "0", "--drain-delay", "0"]
    with log.open("w") as stream:
        process = subprocess.Popen([LIGHT, "serve", str(tmp_path), *arguments], stdout=stream, stderr=stream, env=dict(os.environ))
    try:
        url = wait_for_url(process, log)
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
            model = client.models.list().data[0].id
            parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in (FIRST, SECOND)]
            messages = [
                {"role": "system", "content": "w3"},
                {"role": "user", "content": [parts[0], {"type": "text", "text": "w7"}, parts[1]]},
            ]
            options = {"model": model, "messages": messages, "max_tokens": NUM_OUTPUT, "temperature": 0}
            more = {"ignore_eos": True, "skip_special_tokens": False}
            # Words of the template are none of the vocabulary: each is word 0.
            start, end = IDS["<|im_start|>"], IDS["<|im_end|>"]
            prompt = [start, 0, 3, end, start, 0, *PICTURE_IDS, 7, *PICTURE_IDS, end, start, 0]
            _, expected = greedy(source, prompt, [FIRST, SECOND])
            words = [SPECIAL[token - 100] if 100 <= token < 100 + len(SPECIAL) else f"w{token}" for token in expected]
            answer = client.chat.completions.create(**options, extra_body=more)
            assert re.findall(r"w\d+|<[^>]*>", answer.choices[0].message.content) == words
            chunks = client.chat.completions.create(**options, extra_body=more, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert re.findall(r"w\d+|<[^>]*>", text) == words
            tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
            check_control_tokens(url, model, tokenizer, placeholder="<|image_pad|>", picture=parts[1])
            assert client.chat.completions.create(**options, extra_body=more).choices == answer.choices
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


def wait_for_url(process, log):
    """The address in the line that says "ready"."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := re.search(r"ready in [\d.]+ s: (http://[\d.]+:\d+)/v1", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready in {START_S} s:\n{log.read_text()}")


# ------------------------------------------------------------------------------------- Qwen-VL of 2023

RANKS = 256
IMG = RANKS + 208 + 6
FIRST_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": RANKS + 217,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "kv_channels": 32,
    "seq_length": 256,
    "no_bias": True,
    "visual": {
        "width": 32,
        "mlp_ratio": 2.0,
        "heads": 2,
        "layers": 1,
        "image_size": 56,
        "patch_size": 14,
        "output_dim": 128,
        "image_start_id": IMG,
        "n_queries": 9,
    },
}
PLUGINS = ("light_qwen.hooks", "light_qwen_vl.hooks")


def write_first(folder, **changes):
    """A tiny Qwen-VL-Chat as it is published: no tokenizer.json, no chat template. Its tensors, by name and shape, and `changes`
    of its config.json."""
    vocab, size, inner, width = FIRST_CONFIG["vocab_size"], 128, 32, 32
    shapes = {"wte.weight": (vocab, size), "ln_f.weight": (size,), "h.0.ln_1.weight": (size,), "h.0.ln_2.weight": (size,)}
    shapes |= {"h.0.attn.c_attn.weight": (3 * size, size), "h.0.attn.c_attn.bias": (3 * size,), "h.0.attn.c_proj.weight": (size, size)}
    shapes |= {"h.0.mlp.w1.weight": (inner, size), "h.0.mlp.w2.weight": (inner, size), "h.0.mlp.c_proj.weight": (size, inner)}
    linears = {"attn.in_proj": (3 * width, width), "attn.out_proj": (width, width), "mlp.c_fc": (64, width), "mlp.c_proj": (width, 64)}
    block = "visual.transformer.resblocks.0"
    for name, (rows, columns) in linears.items():
        shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    norms = {f"{block}.ln_1": width, f"{block}.ln_2": width, "visual.ln_pre": width, "visual.ln_post": size}
    for name, length in (norms | {"visual.attn_pool.ln_q": size, "visual.attn_pool.ln_kv": size}).items():
        shapes |= {f"{name}.weight": (length,), f"{name}.bias": (length,)}
    shapes |= {"visual.conv1.weight": (width, 3, 14, 14), "visual.positional_embedding": (16, width), "visual.proj": (size, size)}
    pool = {"query": (9, size), "pos_embed": (9, size), "kv_proj.weight": (size, width), "attn.in_proj_weight": (3 * size, size)}
    pool |= {"attn.in_proj_bias": (3 * size,), "attn.out_proj.weight": (size, size), "attn.out_proj.bias": (size,)}
    shapes |= {f"visual.attn_pool.{name}": shape for name, shape in pool.items()}
    generator = torch.Generator().manual_seed(0)
    scale = {1: 0.1, 2: 0.3, 4: 0.1}
    tensors = {
        f"transformer.{name}": torch.randn(shape, generator=generator) * scale[len(shape)] + (len(shape) == 1 and name.endswith("weight"))
        for name, shape in shapes.items()
    }
    tensors["lm_head.weight"] = torch.randn((vocab, size), generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FIRST_CONFIG | changes))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": RANKS}))
    lines = [base64.b64encode(bytes([byte])).decode() + f" {byte}\n" for byte in range(RANKS)]
    (folder / "qwen.tiktoken").write_text("".join(lines))


def read_first_tokenizer(folder):
    """As its plugins make it of the files in `folder`."""
    return add_image_tokens(load_tokenizer(folder))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen-vl")
    write_first(folder)
    return folder


@pytest.fixture(scope="module")
def first_llm(first):
    """Found by the checkpoint's architecture alone, which is its text model's."""
    llm = LLM(str(first), dtype="float32", device="cpu", max_num_batched_tokens=16, max_num_seqs=4)
    yield llm
    llm.shutdown()


@pytest.mark.parametrize("eager", [False, True])
def test_encoders_capture_nothing_where_that_is_switched_off(checkpoint, first, eager):
    for folder in (checkpoint[0], first):
        config = EngineConfig(model=str(folder), device="cpu", enforce_eager=eager)
        (encoder,) = bind_model(resolve_model(config), config, "meta").media_encoders
        assert encoder.module.graphs._captures is not eager


def step_by_step(folder, prompt, pictures):
    """Without the engine: `prompt` with pictures at their placeholders."""
    runtime = load_model(folder, PLUGINS, max_model_len=256)
    (encoder,) = runtime.media_encoders
    items = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PPM")
        items.append(encoder.preprocess(buffer.getvalue()))
    rows = [row for row, token in enumerate(prompt) if token == IMG + 2]
    with torch.inference_mode():
        tokens = MediaTokens(encoder.module(items), torch.tensor(rows))
    driver = Driver(runtime)
    request = driver.start(prompt, media={"image": tokens})
    for _ in range(NUM_OUTPUT):
        (logits,) = driver.step([(request, request.num_pending)])
        request.tokens.append(int(logits[-1].argmax()))
    return request.tokens[len(prompt) :]


def test_the_first_generations_own_form_of_prompts(first, first_llm):
    """An address stands where the picture is in the models' own form; the picture comes beside the prompt."""
    prompt = "Picture 1: <img>assets/a.jpeg</img>\nPicture 2: <img></img>\nBox <ref>it</ref>"
    (result,) = first_llm.generate([{"prompt": prompt, "multi_modal_data": {"image": [FIRST, SECOND]}}], PARAMS, use_tqdm=False)
    picture = [IMG, *[IMG + 2] * 9, IMG + 1]
    expected = [*b"Picture 1: ", *picture, *b"\nPicture 2: ", *picture, *b"\nBox ", IMG - 6, *b"it", IMG - 5]
    assert result.prompt_token_ids == expected
    assert result.outputs[0].token_ids == step_by_step(first, expected, [FIRST, SECOND])
    other = step_by_step(first, expected, [SECOND, FIRST])
    assert other != result.outputs[0].token_ids, "these weights see pictures"


def test_the_first_generations_conversations(first, first_llm):
    parts = [{"type": "image_url", "image_url": {"url": data_url(FIRST)}}, {"type": "text", "text": "a<img>b</img><imgpad>"}]
    (result,) = first_llm.chat([{"role": "user", "content": parts}], PARAMS, use_tqdm=False)
    assert result.prompt.replace("\ufdd0", "") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <img><imgpad></img>\na<img>b</img><imgpad><|im_end|>\n<|im_start|>assistant\n"
    )
    ids = result.prompt_token_ids
    assert [ids.count(IMG + i) for i in range(3)] == [1, 1, 9], "what a client writes is text"
    assert result.outputs[0].token_ids == step_by_step(first, ids, [FIRST])


def test_boxes_are_shown_in_answers(first_llm):
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={IMG - 4: 100}, ignore_eos=True)
    (result,) = first_llm.generate(["a"], params, use_tqdm=False)
    assert result.outputs[0].text == "<box><box>"


def test_without_the_plugin_that_sees_the_checkpoint_is_refused(first):
    with pytest.raises(CheckpointError, match="visual"):
        load_model(first, PLUGINS[:1])
