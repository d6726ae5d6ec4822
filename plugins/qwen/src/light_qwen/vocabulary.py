"""What is known of the first generation's vocabulary without reading all of it. Imports nothing heavy."""

from pathlib import Path

__all__ = ["END_OF_TEXT", "IM_END", "IM_START", "VOCABULARY", "has_vocabulary", "turn_ids"]

VOCABULARY = "qwen.tiktoken"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
RELEASED_SIZE = 151643
"""Tokens in the vocabulary file of every model that was released; special tokens follow."""


def has_vocabulary(folder: str | Path) -> bool:
    """Whether the tokenizer is to be made of `VOCABULARY`: it is there, and no converted tokenizer.json."""
    return (Path(folder) / VOCABULARY).is_file() and not (Path(folder) / "tokenizer.json").is_file()


def turn_ids(folder: str | Path) -> tuple[int, int]:
    """Ids of `IM_START` and `IM_END`, which follow `END_OF_TEXT`."""
    file, size = Path(folder) / VOCABULARY, RELEASED_SIZE
    if file.is_file():
        size = sum(1 for line in file.read_bytes().splitlines() if line.strip())
    return size + 1, size + 2
