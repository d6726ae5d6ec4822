"""Where items stand in prompts: placeholders found and replaced by as many token ids as an item has.

The ids are the placeholder's own, within the vocabulary; ids that tell one picture from another are the engine's affair
(`light_core.engine.media`). Used by the HTTP server and by the offline API.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from light_core.errors import RequestError
from light_core.types import MediaEncoder

if TYPE_CHECKING:
    from light_core.text.tokenizer import Tokenizer

__all__ = ["ItemMark", "MediaKind", "MediaPlaces", "media_kinds"]


@dataclass(frozen=True, slots=True)
class MediaKind:
    """What a model takes beside text, as its `MediaEncoder` says."""

    encoder: str
    kind: str
    placeholder: str
    token_id: int | None
    marker: str


def media_kinds(encoders: Sequence[MediaEncoder]) -> tuple[MediaKind, ...]:
    """Of all encoders of a model."""
    return tuple(MediaKind(one.name, one.kind, one.placeholder, one.token_id, one.marker or one.placeholder) for one in encoders)


@dataclass(frozen=True, slots=True)
class ItemMark:
    """What a prompt needs to know of an item: its kind, and how many tokens it takes."""

    kind: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A placeholder in a prompt that is being read: an entry among token ids."""

    kind: str
    fill: int


class MediaPlaces:
    """The placeholders of one model with one tokenizer.

    Args:
        kinds: of the model; one for each kind of item counts, the first.
        tokenizer: None takes prompts of token ids alone.
        vocab_size: of the model; a placeholder whose id is beyond it (some tokenizers have more) is filled with 0s.
    """

    def __init__(self, kinds: Sequence[MediaKind], tokenizer: "Tokenizer | None", vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.kinds = {one.kind: one for one in reversed(kinds)}
        self._by_id: dict[int, _Place] = {}
        self._texts: dict[str, _Place] = {}
        for one in self.kinds.values():
            known = _token_of(tokenizer, one.placeholder) if tokenizer is not None and one.placeholder else None
            token = known if known is not None else one.token_id
            place = _Place(one.kind, token if token is not None and token < vocab_size else 0)
            if token is not None:
                self._by_id[token] = place
            if one.placeholder and known is None:
                self._texts[one.placeholder] = place
        self._pattern = _any_of(self._texts)
        special = [] if tokenizer is None else sorted(tokenizer.special_strings)
        around = [text for text in special if any(text in one.marker for one in self.kinds.values())]
        self._literals = _any_of([*around, *(one.placeholder for one in self.kinds.values() if one.placeholder)])

    def marker(self, kind: str) -> str:
        """What stands for an item in text; raises `RequestError` if the model takes none of this kind."""
        if kind not in self.kinds:
            taken = ", ".join(["text", *self.kinds])
            raise RequestError(f"messages: this model takes {taken}, not {kind}", "messages")
        return self.kinds[kind].marker

    def literal(self, text: str) -> str:
        """`text`, which a client has sent, with each placeholder in it cut, and each special token that stands around one, so
        that they stay text."""
        from light_core.text.tokenizer import LITERAL_MARK

        if self._literals is None:
            return text
        return self._literals.sub(lambda found: found[0][0] + LITERAL_MARK + found[0][1:], text)

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int | _Place]:
        """Token ids of `text`, with its placeholders.

        Args:
            text: of the prompt.
            encode: text to token ids; is given the whole of it, or the pieces between placeholders that are no tokens.
        """
        if self._pattern is None:
            return self.find(encode(text))
        found: list[int | _Place] = []
        end = 0
        for hit in self._pattern.finditer(text):
            if hit.start() > end:
                found += self.find(encode(text[end : hit.start()]))
            found.append(self._texts[hit[0]])
            end = hit.end()
        return found + (self.find(encode(text[end:])) if end < len(text) or not found else [])

    def encode_prompt(self, text: str, encode: Callable[[str, bool], list[int]], add_special_tokens: bool) -> list[int | _Place]:
        """As `encode`, for a prompt as a client writes it: `encode` takes a text and whether to add begin tokens, which come
        once, at the front, however the text is cut."""
        if self._pattern is None or self._pattern.search(text) is None:
            return self.find(encode(text, add_special_tokens))
        prefix: list[int | _Place] = list(encode("", True)) if add_special_tokens else []
        return prefix + self.encode(text, lambda piece: encode(piece, False))

    def find(self, token_ids: Sequence[int]) -> list[int | _Place]:
        """`token_ids` with their placeholders."""
        return [self._by_id.get(token, token) for token in token_ids] if self._by_id else list(token_ids)

    def fill(self, found: Sequence[int | _Place], items: Sequence[ItemMark], param: str) -> tuple[list[int], list[int]]:
        """The prompt's token ids, and where each item begins in it.

        Args:
            found: from `encode` or `find`.
            items: in order.
            param: request field, for messages.

        Raises:
            RequestError: there are not as many placeholders as items, or an item is of another kind than its placeholder.
        """
        places = [entry for entry in found if isinstance(entry, _Place)]
        if [place.kind for place in places] != [item.kind for item in items]:
            wanted = " or ".join(repr(one.placeholder) for one in self.kinds.values() if one.placeholder) or "its token"
            raise RequestError(f"{param}: {len(places)} placeholders ({wanted}) for {len(items)} items; there must be one for each", param)
        return _filled(found, iter(items))


def _filled(found: Sequence[int | _Place], items: Iterator[ItemMark]) -> tuple[list[int], list[int]]:
    token_ids: list[int] = []
    starts: list[int] = []
    for entry in found:
        if isinstance(entry, _Place):
            starts.append(len(token_ids))
            token_ids += [entry.fill] * next(items).num_tokens
        else:
            token_ids.append(entry)
    return token_ids, starts


def _token_of(tokenizer: "Tokenizer", text: str) -> int | None:
    """The id of `text` if the tokenizer has it as one token that it finds in any text."""
    return tokenizer.added_id(text)


def _any_of(texts: "Sequence[str] | dict[str, _Place]") -> re.Pattern[str] | None:
    wanted = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, wanted))) if wanted else None
