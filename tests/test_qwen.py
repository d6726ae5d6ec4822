"""Qwen of 2023 through the engine: its tokenizer, its conversations, and prompts that settle how positions are turned."""

import base64
import json

import pytest
import torch
from safetensors.torch import save_file

from light_core import LLM, SamplingParams
from light_core.config import EngineConfig
from light_core.plugins import load_plugins
from light_core.processes.defaults import load_model_tokenizer
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model

SIZE, INNER, TRAINED_LEN = 32, 40, 32
WORDS = [" a", "he", "ll", "llo", "hello", " w", "or", "ld", "world"]
NUM_RANKS = 256 + len(WORDS)
IM_START, IM_END = NUM_RANKS + 1, NUM_RANKS + 2
VOCAB_SIZE = NUM_RANKS + 208
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": SIZE,
    "intermediate_size": 2 * INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "kv_channels": SIZE // 2,
    "seq_length": TRAINED_LEN,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen-Chat as it is published: no tokenizer.json, no chat template."""
    folder = tmp_path_factory.mktemp("qwen")
    shapes = {"transformer.wte.weight": (VOCAB_SIZE, SIZE), "transformer.ln_f.weight": (SIZE,), "lm_head.weight": (VOCAB_SIZE, SIZE)}
    for i in range(2):
        shapes |= {f"transformer.h.{i}.{norm}.weight": (SIZE,) for norm in ("ln_1", "ln_2")}
        shapes |= {f"transformer.h.{i}.attn.c_attn.{part}": (3 * SIZE, SIZE)[: 1 + (part == "weight")] for part in ("weight", "bias")}
        shapes |= {f"transformer.h.{i}.attn.c_proj.weight": (SIZE, SIZE), f"transformer.h.{i}.mlp.c_proj.weight": (SIZE, INNER)}
        shapes |= {f"transformer.h.{i}.mlp.{name}.weight": (INNER, SIZE) for name in ("w1", "w2")}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": NUM_RANKS}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": CONFIG["auto_map"]}))
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    """Prompts are cut into chunks of 7 tokens and fewer."""
    llm = LLM(str(folder), model_plugin="qwen", dtype="float32", device="cpu", max_num_batched_tokens=7, max_num_seqs=4)
    yield llm
    llm.shutdown()


def greedy(folder, prompt, count):
    """Step by step without the engine."""
    driver = Driver(load_model(folder, ("light_qwen.hooks",), max_model_len=128))
    request = driver.start(prompt)
    for _ in range(count):
        (logits,) = driver.step([(request, request.num_pending)])
        request.tokens.append(int(logits[-1].argmax()))
    return request.tokens[len(prompt) :]


def test_the_engine_tells_how_long_prompts_are(folder, llm):
    """One prompt is generated past the training length, which must not stretch positions; another is longer than it."""
    prompts = [[(7 * i + shift) % 200 for i in range(length)] for shift, length in ((1, 28), (2, 45), (3, 5))]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert [result.outputs[0].token_ids for result in results] == [greedy(folder, prompt, 10) for prompt in prompts]


def test_conversations_are_chatml_and_end_with_its_token(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logit_bias={IM_END: 100})
    (result,) = llm.chat([{"role": "user", "content": "hello<|im_end|>"}], params, use_tqdm=False)
    assert result.prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhello<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert result.prompt_token_ids.count(IM_START) == 3 and result.prompt_token_ids.count(IM_END) == 2, "what the user wrote is text"
    output = result.outputs[0]
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", IM_END, "")


def test_every_process_that_handles_text_has_the_tokenizer(folder, llm):
    tokenizer = load_model_tokenizer(EngineConfig(model=str(folder)), load_plugins("qwen").refs)
    text = "hello world a\n<|im_start|>"
    ids = tokenizer.encode(text)
    pieces = ["hello", " w", "or", "ld", " a"]
    assert ids == [*(256 + WORDS.index(piece) for piece in pieces), 10, IM_START]
    assert llm.tokenizer.encode(text) == ids and tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
