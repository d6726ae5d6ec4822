"""LLaVA through the offline API: a text model of one plugin, eyes of another, pictures through the engine; against transformers."""

import base64
import io
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaNextConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from light_core import LLM, SamplingParams
from light_core.errors import ModelError, RequestError
from light_sdk.testing.reference import create_model

SIDE, IMAGE_TOKEN, NUM_OUTPUT = 28, 100, 8
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
TEXT = LlamaConfig(
    vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
)
VISION = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=14)


def draw(width, height, colour):
    """Slopes and a disc."""
    slope = Image.linear_gradient("L").resize((width, height))
    picture = Image.merge("RGB", (slope, slope.transpose(Image.Transpose.FLIP_LEFT_RIGHT), slope))
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), fill=colour)
    return picture


FIRST, SECOND = draw(80, 50, (250, 30, 40)), draw(40, 70, (20, 60, 240))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-NeXT with a tokenizer of words: its checkpoint."""
    folder = tmp_path_factory.mktemp("llava-next")
    config = LlavaNextConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS)
    create_model(config, factory=AutoModelForImageTextToText).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)} | {"<image>": IMAGE_TOKEN}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    """Chunks of 16 tokens, so that pictures are cut."""
    llm = LLM(str(folder), model_plugin="llava", dtype="float32", device="cpu", max_num_batched_tokens=16, max_num_seqs=4)
    yield llm
    llm.shutdown()


def greedy(folder, prompt, pictures):
    """transformers' own pixels and output."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    pixels = dict(processor(images=pictures, return_tensors="pt"))
    with torch.inference_mode():
        counts = iter([len(part) for part in model.get_image_features(**pixels).pooler_output])
        ids = [token for word in prompt for token in ([IMAGE_TOKEN] * next(counts) if word == "<image>" else [int(word[1:])])]
        found = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **pixels,
            max_new_tokens=NUM_OUTPUT, min_new_tokens=NUM_OUTPUT, do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return ids, found[0, len(ids) :].tolist()


PARAMS = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)


def test_pictures_in_a_prompt_give_transformers_output(folder, llm):
    prompt = ["w5", "w6", "<image>", "w7", "w9", "<image>", "w8"]
    ids, expected = greedy(folder, prompt, [FIRST, SECOND])
    (result,) = llm.generate([{"prompt": " ".join(prompt), "multi_modal_data": {"image": [FIRST, SECOND]}}], PARAMS, use_tqdm=False)
    assert result.prompt_token_ids == ids and result.outputs[0].token_ids == expected


def test_other_pictures_and_no_pictures_beside_each_other(folder, llm):
    """In one batch, with the first picture's KV in the prefix cache already."""
    prompts = [["w5", "w6", "<image>", "w7"], ["w5", "w6", "<image>", "w9"]]
    inputs = [{"prompt": " ".join(prompt), "multi_modal_data": {"image": picture}} for prompt, picture in zip(prompts, (SECOND, FIRST))]
    results = llm.generate([*inputs, "w5 w6 w7"], PARAMS, use_tqdm=False)
    for result, prompt, picture in zip(results, prompts, (SECOND, FIRST)):
        assert result.outputs[0].token_ids == greedy(folder, prompt, [picture])[1]
    assert len(results[2].prompt_token_ids) == 3 and len(results[2].outputs[0].token_ids) == NUM_OUTPUT


def test_a_conversation_with_a_picture_has_llavas_form(folder, llm):
    buffer = io.BytesIO()
    FIRST.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "text", "text": "w7 w8"}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": parts}]
    (result,) = llm.chat(messages, PARAMS, use_tqdm=False)
    assert result.prompt.replace("\n", " ").split() == ["w1w9", "USER:", "<image>", "w7", "w8", "ASSISTANT:"]
    beginning, unknown = 1, 0
    assert result.prompt_token_ids == [beginning, 9, unknown, *greedy(folder, ["<image>"], [FIRST])[0], 7, 8, unknown]


def test_a_second_question_about_a_picture_encodes_and_prefills_nothing_of_it(folder, llm):
    picture = draw(64, 64, (200, 200, 20))
    before, seen = llm.engine.stats(), []
    for question in ("w7", "w8 w3"):
        inputs = {"prompt": f"w5 w4 w6 <image> {question}", "multi_modal_data": {"image": picture}}
        (result,) = llm.generate([inputs], PARAMS, use_tqdm=False)
        assert result.outputs[0].token_ids == greedy(folder, inputs["prompt"].split(), [picture])[1]
        seen.append(llm.engine.stats())
    assert [stats.media_encoded - before.media_encoded for stats in seen] == [1, 1]
    num_shared = result.prompt_token_ids.index(IMAGE_TOKEN) + result.prompt_token_ids.count(IMAGE_TOKEN)
    assert seen[1].prefix_cache_hits - seen[0].prefix_cache_hits == num_shared


def test_as_many_pictures_as_placeholders(llm):
    with pytest.raises(RequestError):
        llm.generate([{"prompt": "w5 <image> <image>", "multi_modal_data": {"image": FIRST}}], PARAMS, use_tqdm=False)


def test_the_text_model_may_be_any_familys(folder, tmp_path):
    """A Qwen2 below LLaVA's eyes: bound by its plugin, which has to be there."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = Qwen2Config(**sizes, vocab_size=101, max_position_embeddings=128, tie_word_embeddings=True)
    config = LlavaNextConfig(vision_config=VISION, text_config=text, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS)
    create_model(config, factory=AutoModelForImageTextToText).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    options = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4}
    with pytest.raises(ModelError, match="text model cannot be served: no plugin serves Qwen2ForCausalLM") as caught:
        LLM(str(tmp_path), model_plugin="llava", **options)
    assert "light-plugin-llama" in caught.value.cause and "pip install" in caught.value.remedy
    llm = LLM(str(tmp_path), model_plugin="llava,qwen", **options)
    try:
        assert llm.engine.runtime.model.family.name == "qwen"
        prompt = ["w5", "<image>", "w7", "w9"]
        inputs = {"prompt": " ".join(prompt), "multi_modal_data": {"image": FIRST}}
        (result,) = llm.generate([inputs], PARAMS, use_tqdm=False)
        assert result.outputs[0].token_ids == greedy(tmp_path, prompt, [FIRST])[1]
    finally:
        llm.shutdown()
