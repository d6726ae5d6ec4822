"""The tokenizer of Qwen's first generation, made of its vocabulary file `qwen.tiktoken`.

Its repositories have that file and Python code that reads it; the code is never run. The file has a line a token: the
token's bytes in base64, and its rank. Encoding splits text by a regular expression, and merges the bytes of each piece
pair by pair, the pair with the lowest rank of its joined bytes first (byte-level BPE as the library tiktoken does it).
Here `tokenizers` does it, with a merge for every pair that tiktoken would join. Imports no torch.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from light_qwen.vocabulary import END_OF_TEXT, IM_END, IM_START, VOCABULARY
from light_sdk import ModelError

__all__ = ["load_tokenizer", "read_ranks"]

PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Contractions, words with what stands before them, single digits, punctuation, line ends, white space."""
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`; special tokens follow the file's tokens, in the order of `SPECIAL_TOKENS`.

    Raises:
        ModelError: the file is missing or not a vocabulary.
    """
    ranks = read_ranks(Path(folder) / VOCABULARY)
    spelt = {token: "".join(map(_ALPHABET.__getitem__, token)) for token in ranks}
    merges = [(spelt[left], spelt[right]) for left, right in _pairs(ranks)]
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    create: Any = PreTrainedTokenizerFast  # its constructor has no types
    return cast(PreTrainedTokenizerFast, create(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT))


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes to rank, which is the token's id, in ascending order.

    Raises:
        ModelError: the file is missing, a line is malformed, ranks have gaps, or one of the 256 bytes is no token.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise ModelError(f"{file} cannot be read", str(error), "get the model again") from error
    except (ValueError, binascii.Error) as error:
        raise ModelError(
            f"{file} is not a vocabulary", f"a line is not a token in base64 and its rank: {error}", "get the model again"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        cause = f"{len(ranks)} tokens, whose ranks should count up from 0 and which should have every byte among them"
        raise ModelError(f"{file} is not a whole vocabulary", cause, "get the model again")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _pairs(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens whose bytes together are a token, by that token's rank."""
    for token in ranks:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        yield from sorted(((a, b) for a, b in halves if a in ranks and b in ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte (GPT-2): itself in most of Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = _byte_alphabet()
