"""How LLaVA converses, where its tokenizer does not say. Imports nothing heavy."""

import json
from pathlib import Path

from light_sdk import ChatSpec, ModelContext

__all__ = ["MISTRAL", "VICUNA", "chat_spec"]

_TEXT = (
    "{% set ns = namespace(text='') %}"
    "{% if message['content'] is string %}{% set ns.text = message['content'] %}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set ns.text = '<image>\\n' + ns.text %}"
    "{% else %}{% set ns.text = ns.text + part['text'] %}{% endif %}{% endfor %}{% endif %}"
)
"""A message's text in `ns.text`, pictures before words."""

VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}" + _TEXT + "{% if message['role'] == 'system' %}{{ ns.text + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + ns.text + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + ns.text + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Vicuna's conversation of version 1.1, which LLaVA 1.5 and 1.6 were tuned with."""

MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}" + _TEXT + "{% if message['role'] == 'assistant' %}{{ ' ' + ns.text + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '[INST] ' + ns.text + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + ns.text + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
"""Mistral's instructions, of LLaVA 1.6 over Mistral 7B."""


def chat_spec(model: ModelContext) -> ChatSpec | None:
    """The template of chat_template.json, which tokenizers do not read; else that of the text model's kind."""
    template = _of_processor(Path(model.folder))
    if template is not None:
        # A processor adds the beginning of sequence itself.
        return ChatSpec(template=template if "bos_token" in template else "{{ bos_token }}" + template)
    known = {"llama": VICUNA, "mistral": MISTRAL}.get(getattr(model.config, "model_type", ""))
    return None if known is None else ChatSpec(template=known)


def _of_processor(folder: Path) -> str | None:
    try:
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None
