"""Conversations of LLaVA: whose template, and what comes out of it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

from light_llava.hooks import FAMILIES, light_chat

PICTURE = {"type": "image"}
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "
SYSTEM += "The assistant gives helpful, detailed, and polite answers to the user's questions. "


def model(folder: Path, model_type: str = "llama", family: str | None = None) -> Any:
    served = next((one for one in FAMILIES if one.name == family), FAMILIES[0])
    return SimpleNamespace(checkpoint_family=served, folder=str(folder), config=SimpleNamespace(model_type=model_type))


def render(template: str | None, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    assert template is not None
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return environment.from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **names)


def said(*parts: Any) -> list[dict[str, Any]]:
    return [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]


def test_vicunas_conversation(tmp_path: Path) -> None:
    """As the authors' conversation "vicuna_v1" writes it; pictures come before the words of their message."""
    spec = light_chat(model(tmp_path))
    assert spec is not None
    messages = [
        {"role": "user", "content": said("What is this?", PICTURE)},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": said(PICTURE, PICTURE, "And ", "these?")},
    ]
    expected = f"<s>{SYSTEM}USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: <image>\n<image>\nAnd these? ASSISTANT:"
    assert render(spec.template, messages) == expected
    assert render(spec.template, [{"role": "system", "content": "Be brief."}, *messages[:1]]) == (
        "<s>Be brief. USER: <image>\nWhat is this? ASSISTANT:"
    )
    assert render(spec.template, messages[:2], add_generation_prompt=False).endswith("ASSISTANT: A cat.</s>")


def test_mistrals_conversation(tmp_path: Path) -> None:
    spec = light_chat(model(tmp_path, "mistral", "llava-next"))
    assert spec is not None
    messages = [
        {"role": "user", "content": said(PICTURE, "What?")},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    assert render(spec.template, messages) == "<s>[INST] <image>\nWhat? [/INST] A cat.</s>[INST] Sure? [/INST]"


def test_the_checkpoints_own_template_comes_first(tmp_path: Path) -> None:
    """It is the processor's, which puts the beginning of sequence before what it renders."""
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "own {{ messages[0].role }}"}))
    spec = light_chat(model(tmp_path))
    assert spec is not None and render(spec.template, [{"role": "user", "content": ""}]) == "<s>own user"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}own"}))
    spec = light_chat(model(tmp_path))
    assert spec is not None and render(spec.template, [{"role": "user", "content": ""}]) == "<s>own"


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 3}'])
def test_a_template_file_that_is_none_is_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "chat_template.json").write_text(content)
    spec = light_chat(model(tmp_path))
    assert spec is not None and "USER: " in str(spec.template)


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    assert light_chat(model(tmp_path, "qwen2")) is None, "no form is known of it"
    other = SimpleNamespace(checkpoint_family=SimpleNamespace(name="llama"), folder=str(tmp_path), config=None)
    assert light_chat(other) is None  # type: ignore[arg-type]


def test_hooks_import_nothing_heavy() -> None:
    code = "import sys, light_llava.hooks, light_llava.chat; print(sorted({'torch', 'transformers', 'triton', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
