"""Items as processes speak of them: where one comes from, and where it lies once it is preprocessed."""

from typing import Annotated

import msgspec

__all__ = ["MediaSource", "PlacedItem", "PreparedItem"]

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class MediaSource(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An item that a client names.

    Attributes:
        kind: "image".
        url: data URL, or an address.
        param: its field in the request, for messages.
    """

    kind: str
    url: str
    param: str


class PreparedItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A preprocessed item.

    Attributes:
        kind: as its source has it.
        encoder: name of the encoder that it is for.
        key: of its content, 32 bytes.
        num_tokens, grid: as the encoder says.
        offset, length: its region of shared memory.
    """

    kind: str
    encoder: str
    key: bytes
    num_tokens: Count
    grid: tuple[int, ...]
    offset: Bytes
    length: Bytes


class PlacedItem(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A preprocessed item and the position of its first token in a prompt."""

    item: PreparedItem
    start: Count
