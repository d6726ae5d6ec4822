"""Tokens to text, a few at a time: incremental detokenisation and stop strings of one output.

Used by the detokenizer process and by the offline `LLM`; knows nothing of processes. Not here: whole-text decoding
and loading of tokenizers (`text/tokenizer.py`).

Two ways of decoding, chosen once for a tokenizer:

- byte-level BPE (most models): each token is a run of bytes, the output is their concatenation read as UTF-8 with
  replacement. Exact, and a dictionary look-up a token.
- anything else (SentencePiece pieces, WordPiece, slow tokenizers): a token's text depends on its neighbours, so a
  short window of tokens is decoded with and without the new ones, and the difference is the new text.
"""

import codecs
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

__all__ = ["Detokenizer", "IncrementalDecoder"]

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Prompt tokens that the window begins with, so that the first piece's leading space is kept."""
MAX_INCOMPLETE = 3
"""Bytes of an unfinished UTF-8 character, and so replacement characters at the end that may still change."""
MAX_PENDING = 32
"""Tokens of a window whose text is still open, before the older ones count as settled."""


class Detokenizer:
    """What decoding needs of one tokenizer; built once, shared by all outputs.

    Args:
        tokenizer: a transformers tokenizer (fast or slow), a `tokenizers.Tokenizer`, or an object that wraps one of
            them in an attribute `hf`.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer = getattr(tokenizer, "hf", tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._backend = backend if hasattr(backend, "id_to_token") and hasattr(backend, "decoder") else None
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self.byte_level = self._backend is not None and type(self._backend.decoder).__name__ == "ByteLevel"
        self.special_ids = frozenset(self._special_ids())
        self._byte_of = _byte_alphabet() if self.byte_level else {}

    def _special_ids(self) -> Iterable[int]:
        if self._backend is not None:
            return (token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special)
        return (int(token_id) for token_id in self._tokenizer.all_special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; b"" for an id that is not in it."""
        known = self._bytes.get(token_id)
        if known is None:
            assert self._backend is not None
            piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            try:
                known = bytes(map(self._byte_of.__getitem__, piece or ""))
            except KeyError:  # an added token, which is stored as plain text
                known = (piece or "").encode("utf-8", "replace")
            self._bytes[token_id] = known
        return known

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `token_ids` by the tokenizer's own rules, spaces as they are."""
        if self._backend is not None:
            text = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-ins for the 256 bytes (GPT-2): character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


class _ByteStream:
    """Text of a byte-level vocabulary."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._token_bytes = detokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """Text of any vocabulary, by decoding a window of tokens again.

    `prefix` are tokens whose text is out, `pending` those whose text is not (or not all) out; `num_shown` characters
    of the pending text are. A byte-fallback vocabulary (SentencePiece) turns a whole run of byte tokens into
    replacement characters when the run is not valid UTF-8; a character that was complete earlier in the run has then
    been shown already and stays, and the rest is decoded by itself. (The one valid text that is not exact: U+FFFD
    itself, spelt in byte tokens and followed by more byte tokens.)
    """

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._decode = partial(detokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []
        self._num_shown = 0
        self._prefix = list(prompt[-CONTEXT_TOKENS - MAX_INCOMPLETE :])
        self._prefix_text = self._decode(self._prefix)
        while self._prefix and self._prefix_text.endswith(REPLACEMENT):
            # The prompt ends within a character: its bytes must not become part of the output's text.
            self._prefix.pop()
            self._prefix_text = self._decode(self._prefix)

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._pending_text()
        num_open = len(text) - len(text.rstrip(REPLACEMENT))
        settled = text[: len(text) - min(num_open, MAX_INCOMPLETE)]
        new = settled[self._num_shown :]
        self._num_shown = max(self._num_shown, len(settled))
        if text and not num_open:
            self._settle(len(self._pending))
        elif len(self._pending) > MAX_PENDING:
            self._settle_most(bool(text))
        return new

    def finish(self) -> str:
        return self._pending_text()[self._num_shown :]

    def _pending_text(self) -> str:
        text = self._decode(self._prefix + self._pending)
        return text[len(self._prefix_text) :] if text.startswith(self._prefix_text) else self._decode(self._pending)

    def _settle(self, num_tokens: int) -> None:
        self._prefix, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        self._prefix_text = self._decode(self._prefix)
        self._num_shown = 0

    def _settle_most(self, any_text: bool) -> None:
        """Keeps the window short in a long run of tokens without text, or of bytes that are no text."""
        if not any_text:
            self._pending.clear()
            return
        num_shown, before = self._num_shown, self._prefix_text
        num_settled = len(self._pending) - MAX_INCOMPLETE
        head = self._decode(self._prefix + self._pending[:num_settled])
        length = len(head) - len(before) if head.startswith(before) else len(self._decode(self._pending[:num_settled]))
        self._settle(num_settled)
        self._num_shown = max(0, num_shown - length)


class _StopString:
    """Finds one string in a stream of characters (Knuth, Morris and Pratt); `matched` characters of it are at the end."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._border = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._border[length - 1]
            length += text[index] == text[length]
            self._border[index] = length

    def find(self, text: str) -> int | None:
        """Reads `text`; how many of its characters it takes to complete the string, or None."""
        matched, wanted = self.matched, self.text
        if not matched and wanted[0] not in text:
            return None
        for count, char in enumerate(text, 1):
            while matched and char != wanted[matched]:
                matched = self._border[matched - 1]
            matched += char == wanted[matched]
            if matched == len(wanted):
                return count
        self.matched = matched
        return None


class IncrementalDecoder:
    """The text of one output, piece by piece.

    The pieces joined are the output's text as the tokenizer decodes it after the prompt. A piece never ends within a
    character, never holds text of the prompt, and never a part of a stop string: what may become one is held back.
    The stop string that completes first ends the output, the longest where several complete at once.

    Args:
        tokenizer: a tokenizer, or the `Detokenizer` of one where many outputs share it.
        prompt_ids: tokens before the output; the last few are enough.
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the output.
        include_stop: leave the stop string at the end of the text.

    Attributes:
        num_tokens: tokens read; at a stop, those up to the one that completed the stop string.
        stop_hit: the stop string that was found, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        detokenizer = tokenizer if isinstance(tokenizer, Detokenizer) else Detokenizer(tokenizer)
        self._skipped = detokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream: _ByteStream | _WindowStream
        if detokenizer.byte_level:
            self._stream = _ByteStream(detokenizer)
        else:
            self._stream = _WindowStream(detokenizer, prompt_ids, skip_special_tokens)
        self._stops = [_StopString(text) for text in dict.fromkeys(stop)]
        self._include_stop = include_stop
        self._held = ""
        self.num_tokens = 0
        self.stop_hit: str | None = None

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Reads tokens; a token that ended the output is left out by the caller unless its text is wanted.

        Returns:
            the text that is new and safe to show, and the stop string that ended the output, if one did. Tokens
            after a stop string are not read.
        """
        pieces = []
        for token_id in token_ids:
            if self.stop_hit is not None:
                break
            self.num_tokens += 1
            if token_id not in self._skipped:
                pieces.append(self._release(self._stream.push(token_id)))
        return "".join(pieces), self.stop_hit

    def finish(self) -> str:
        """The text that was held back, when the output has ended; "" after a stop string. Call it once."""
        if self.stop_hit is not None:
            return ""
        text = self._release(self._stream.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if not self._stops or not text:
            return text
        hits = [(count, -len(stop.text), stop.text) for stop in self._stops if (count := stop.find(text)) is not None]
        text = self._held + text
        if hits:
            count, _, self.stop_hit = min(hits)
            end = len(self._held) + count
            self._held = ""
            return text[: end if self._include_stop else end - len(self.stop_hit)]
        num_held = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
