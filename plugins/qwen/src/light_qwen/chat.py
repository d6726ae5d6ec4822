"""How the first generation converses: ChatML. Later ones bring their template along. Imports nothing heavy."""

import json
from pathlib import Path

from light_qwen.vocabulary import turn_ids
from light_sdk import ChatSpec

__all__ = ["CHATML", "chat_spec"]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As `make_context` of Qwen-7B-Chat builds it, with its default system message."""


def chat_spec(folder: str) -> ChatSpec | None:
    """ChatML where generation_config.json says `chat_format` "chatml"; None for the base models, which say "raw".

    A turn ends with `<|im_end|>`, which no file of the checkpoint calls an end token.
    """
    try:
        generation = json.loads((Path(folder) / "generation_config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(generation, dict) or generation.get("chat_format") != "chatml":
        return None
    return ChatSpec(template=CHATML, end_token_ids=turn_ids(folder))
