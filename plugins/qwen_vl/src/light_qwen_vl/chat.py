"""How the models converse, where their tokenizers do not say. Imports nothing heavy."""

import json
from dataclasses import replace
from pathlib import Path

from light_sdk import ChatSpec, ModelContext

__all__ = ["CHATML", "FIRST_CHATML", "chat_spec", "first_chat_spec"]

_BEGIN = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

CHATML = (
    _BEGIN + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _END
)
"""Qwen2-VL's and Qwen2.5-VL's, without what only video needs."""

FIRST_CHATML = (
    _BEGIN + "{% set seen = namespace(pictures=0) %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set seen.pictures = seen.pictures + 1 %}"
    "{{ 'Picture ' + seen.pictures | string + ': <img><imgpad></img>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _END
)
"""Qwen-VL-Chat's: pictures are counted through a conversation, each on a line of its own."""


def chat_spec(model: ModelContext) -> ChatSpec:
    """The template of chat_template.json, which tokenizers do not read; else the models' own."""
    return ChatSpec(template=_of_processor(Path(model.folder)) or CHATML)


def first_chat_spec(text: ChatSpec) -> ChatSpec:
    """That of the text model, with pictures."""
    return replace(text, template=FIRST_CHATML)


def _of_processor(folder: Path) -> str | None:
    try:
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None
