"""The echo family keeps to its rule, however its prompt is cut and wherever its KV lies, and notices cross-talk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from light_core.errors import ModelError
from light_core.plugins import ModelRuntime
from light_sdk.testing.driver import Driver, DriverRequest
from light_sdk.testing.echo import SPECIAL_TOKENS, predict, write_model
from light_sdk.testing.loading import load_model

RULES: dict[str, dict[str, Any]] = {
    "repeat": {"echo_rule": "repeat", "echo_period": 5},
    "repeat-by-first-token": {"echo_rule": "repeat"},
    "checksum": {"echo_rule": "checksum"},
}
PROMPT = [20, 9, 33, 14, 27, 50, 8, 41, 41, 12]


@pytest.fixture(params=RULES)
def echo(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelRuntime, dict[str, Any]]:
    config = write_model(tmp_path, **RULES[request.param], num_words=100, max_len=64)
    return load(tmp_path), config


def load(folder: Path) -> ModelRuntime:
    return load_model(folder, ("light_sdk.testing.echo",))


def generate(driver: Driver, request: DriverRequest, count: int, chunk: int = 64) -> list[int]:
    for _ in range(count):
        while request.num_pending:
            (logits,) = driver.step([(request, min(chunk, request.num_pending))])
        request.tokens.append(int(logits[-1].argmax()))
    return request.tokens[-count:]


def test_rule_repeats_with_its_period() -> None:
    config = {"echo_rule": "repeat", "echo_period": 3, "echo_first": 7, "vocab_size": 100}
    assert predict([11, 12, 13], 7, config) == [11, 12, 13, 11, 12, 13, 11]
    assert predict([11, 12], 3, config) == [11, 11, 12]
    assert predict([9, 30, 31], 4, config | {"echo_period": None}) == [30, 31, 30, 31]


def test_rule_sums_every_token() -> None:
    config = {"echo_rule": "checksum", "echo_period": None, "echo_first": 7, "vocab_size": 100}
    assert predict([10, 20], 1, config) == [7 + (11 + 2 * 21) % 93]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_output_is_predicted(echo: tuple[ModelRuntime, dict[str, Any]], chunk: int) -> None:
    runtime, config = echo
    driver = Driver(runtime, seed=chunk)
    assert generate(driver, driver.start(PROMPT), 20, chunk) == predict(PROMPT, 20, config)


def test_output_survives_batching_caching_and_preemption(echo: tuple[ModelRuntime, dict[str, Any]]) -> None:
    runtime, config = echo
    driver = Driver(runtime)
    first = driver.start(PROMPT)
    generate(driver, first, 1)
    other = [*PROMPT[:6], 60, 61]
    second = driver.start(other, prefix=first, prefix_len=6)
    done = driver.step([(second, 2), (first, 1)])
    for request, logits in zip((second, first), done, strict=True):
        request.tokens.append(int(logits[-1].argmax()))
    driver.preempt(first)
    generate(driver, second, 10)
    generate(driver, first, 10, chunk=4)
    assert first.tokens == PROMPT + predict(PROMPT, 12, config)
    assert second.tokens == other + predict(other, 11, config)


def test_every_row_has_logits_whichever_are_asked_for(echo: tuple[ModelRuntime, dict[str, Any]]) -> None:
    """Prompt logprobs ask the post layer for rows that the step did not."""
    runtime, config = echo
    driver = Driver(runtime)
    (logits,) = driver.step([(driver.start(PROMPT), len(PROMPT))])
    assert logits.argmax(-1).tolist() == [predict(PROMPT[: i + 1], 1, config)[0] for i in range(len(PROMPT))]


def test_torn_kv_is_noticed(tmp_path: Path) -> None:
    """A slot overwritten by another request changes a checksum, and in one layer alone, every logit."""
    config = write_model(tmp_path, echo_rule="checksum", num_words=100, max_len=64)
    driver = Driver(load(tmp_path))
    request = driver.start(PROMPT)
    driver.step([(request, 9)])
    for planes in driver.kv:
        planes["token"][request.slots[4]] = 77
    request.tokens[9:] = [PROMPT[9]]
    (logits,) = driver.step([(request, 1)])
    assert int(logits.argmax()) != predict(PROMPT, 1, config)[0]
    driver.kv[1]["token"][request.slots[2]] = 78
    request.tokens.append(30)
    (logits,) = driver.step([(request, 1)])
    assert not logits.any()


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    config = write_model(tmp_path, num_words=100)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("w0 w99 nonsense </s>")
    assert ids == [config["echo_first"], config["vocab_size"] - 1, 0, config["eos_token_id"]]
    assert tokenizer.decode([config["echo_first"], config["echo_first"] + 5]) == "w0 w5"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], add_generation_prompt=True, tokenize=False)
    assert text == "user w1 w2 assistant"
    assert tokenizer.eos_token_id == SPECIAL_TOKENS.index("</s>") and len(tokenizer) == config["vocab_size"]


def test_unknown_rule_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"echo_rule": "shout"}))
    with pytest.raises(ModelError, match="shout"):
        load(tmp_path)


def test_plugin_module_imports_nothing_heavy() -> None:
    code = "import sys, light_sdk.testing.echo; print(sorted({'torch', 'transformers', 'pytest', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
