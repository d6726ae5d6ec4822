"""Logprobs in the shapes of the wire: chat, text completion, and vLLM's `prompt_logprobs`."""

from collections.abc import Mapping, Sequence
from typing import Any

from light_core.engine.requests import TokenLogprobs
from light_core.server.schema import CompletionLogprobs
from light_core.text.tokenizer import Tokenizer

__all__ = ["CompletionLogprobsWriter", "chat_logprobs", "prompt_logprobs_json", "token_text"]

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """The text of a token; without a tokenizer its id, as `token_id:7`."""
    return tokenizer.token_text(token_id) if tokenizer else f"token_id:{token_id}"


def chat_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> list[dict[str, Any]]:
    """Entries of `logprobs.content`, one a token, each with the `top` likeliest."""
    return [
        {**_chat_token(tokenizer, token, entry.logprob), "top_logprobs": [_chat_token(tokenizer, *pair) for pair in entry.top[:top]]}
        for token, entry in zip(token_ids, logprobs, strict=True)
    ]


def _chat_token(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> dict[str, Any]:
    piece = tokenizer.token_bytes(token_id) if tokenizer else token_text(None, token_id).encode()
    return {"token": piece.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(piece)}


def prompt_logprobs_json(tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[Any]:
    """`prompt_logprobs`: for each prompt token null (the first), or token id to logprob, rank and text."""
    return [_prompt_entry(tokenizer, token, entry) for token, entry in zip(token_ids, logprobs, strict=True)]


def _prompt_entry(tokenizer: Tokenizer | None, token_id: int, entry: TokenLogprobs | None) -> Mapping[str, Any] | None:
    if entry is None:
        return None
    ranked = [(token_id, entry.logprob, entry.rank), *((token, value, rank) for rank, (token, value) in enumerate(entry.top, start=1))]
    return {
        str(token): {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": token_text(tokenizer, token)}
        for token, value, rank in ranked
    }


class CompletionLogprobsWriter:
    """Builds the parallel lists of text completions; keeps the text offset of one output.

    Args:
        tokenizer: of the texts.
        top: likeliest tokens at each position. The chosen token is listed too, wherever it ranks.
    """

    def __init__(self, tokenizer: Tokenizer | None, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._offset = 0

    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The lists of these tokens; None is the first prompt token, which nothing predicts."""
        lists = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for token, entry in zip(token_ids, logprobs, strict=True):
            text = token_text(self._tokenizer, token)
            lists.tokens.append(text)
            lists.text_offset.append(self._offset)
            lists.token_logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
            lists.top_logprobs.append(None if entry is None else self._likeliest(text, entry))
            self._offset += len(text)
        return lists

    def _likeliest(self, chosen: str, entry: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, value in entry.top[: self._top]:
            # Two tokens may have the same text; the likelier one stands for both.
            found.setdefault(token_text(self._tokenizer, token), max(value, LOWEST))
        found[chosen] = max(entry.logprob, LOWEST)
        return found
