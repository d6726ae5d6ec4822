"""Media of the offline API: pictures that the program itself has, prepared in this process.

The same decoding, hashing and preprocessing as the server's, without processes and without addresses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from light_core.errors import RequestError
from light_core.media.pixels import ImageLimits, Pixels, decode_image, image_pixels
from light_core.media.places import ItemMark, MediaPlaces, media_kinds
from light_core.media.settings import MediaSettings
from light_core.media.sources import read_data_url, scheme_of
from light_core.types import MediaEncoder

if TYPE_CHECKING:
    import torch

    from light_core.text.tokenizer import Tokenizer

__all__ = ["OfflineItem", "OfflineMedia"]


@dataclass(frozen=True, slots=True, eq=False)
class OfflineItem:
    """A preprocessed item."""

    encoder: str
    mark: ItemMark
    key: bytes
    grid: tuple[int, ...]
    tensors: "Mapping[str, torch.Tensor]"


class OfflineMedia:
    """What a model takes beside text, in one process.

    Args:
        encoders: of the model, one at least.
        tokenizer: None takes prompts of token ids.
        vocab_size: of the model.
    """

    def __init__(self, encoders: Sequence[MediaEncoder], tokenizer: "Tokenizer | None", vocab_size: int) -> None:
        self._encoders = {encoder.kind: encoder for encoder in reversed(encoders)}
        self._settings = settings = MediaSettings()
        self._limits = ImageLimits(settings.max_image_pixels, settings.max_image_ratio, settings.max_image_frames)
        self.places = MediaPlaces(media_kinds(encoders), tokenizer, vocab_size)

    def items(self, data: Mapping[str, Any]) -> list[OfflineItem]:
        """Prepares `multi_modal_data`: kind to one item or a list of them, each a `PIL.Image`, the bytes of a file, or a
        data URL.

        Raises:
            RequestError: the model does not take this kind, or an item is none.
        """
        listed = [(kind, item) for kind, items in data.items() for item in (items if isinstance(items, (list, tuple)) else [items])]
        return [self.item(kind, item, f"multi_modal_data.{kind}") for kind, item in listed]

    def item(self, kind: str, source: Any, param: str) -> OfflineItem:
        """Prepares one item; raises as `items`."""
        if kind not in self._encoders:
            raise RequestError(f"{param}: this model takes {', '.join(['text', *self._encoders])}", param)
        encoder = self._encoders[kind]
        if kind != "image":
            raise RequestError(f"{param}: media of kind {kind!r} cannot be read yet, images can", param)
        pixels = self._pixels(source, param)
        tensors = encoder.preprocess(pixels.ppm)
        grid = encoder.grid(tensors) if encoder.grid is not None else ()
        return OfflineItem(encoder.name, ItemMark(kind, encoder.num_tokens(tensors)), pixels.digest, grid, tensors)

    def _pixels(self, source: Any, param: str) -> Pixels:
        if isinstance(source, str) and scheme_of(source) == "data":
            source = read_data_url(source, self._settings, param)
        if isinstance(source, bytes):
            return decode_image(source, self._limits)
        from PIL.Image import Image

        if not isinstance(source, Image):
            raise RequestError(f"{param}: give a PIL image, the bytes of a file, or a data: URL, not {type(source).__name__}", param)
        return image_pixels(source)
