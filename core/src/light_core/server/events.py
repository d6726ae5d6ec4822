"""Chunks of an OpenAI stream as bytes. All but the text is encoded once a stream; a delta costs one encoding and one join."""

import msgspec

from light_core.server.generation import Generation
from light_core.server.schema import StreamOptions

__all__ = ["ChunkWriter", "encode"]

encode = msgspec.json.Encoder().encode


class ChunkWriter:
    """Writes the chunks of one stream.

    Args:
        object_name: "chat.completion.chunk" or "text_completion".
        request_id: constant over the stream, as `created` and `model` are.
        created: seconds since the epoch.
        model: the served name.
        generation: whose tokens are counted.
        options: which usage the client asked for.
    """

    def __init__(
        self, object_name: str, request_id: str, created: int, model: str, generation: Generation, options: StreamOptions | None
    ) -> None:
        common = encode({"id": request_id, "object": object_name, "created": created, "model": model})[:-1]
        self._head = b"data: " + common + b',"choices":[{"index":'
        self._last = b"data: " + common + b',"choices":[],"usage":'
        self._heads = [self._head + b"%d," % choice for choice in range(generation.num_choices)]
        self._generation = generation
        self._include = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._end = b',"usage":null}\n\n' if self._include else b"}\n\n"

    def chunk(self, choice: int, body: bytes) -> bytes:
        """An event with one choice, whose fields after `index` are `body`: `"delta":{…},…,"finish_reason":null}]`."""
        if self._continuous:
            return b"".join((self._heads[choice], body, b',"usage":', encode(self._generation.usage()), b"}\n\n"))
        return b"".join((self._heads[choice], body, self._end))

    def usage(self) -> bytes:
        """The event with the usage and no choice, where it was asked for; else b""."""
        return self._last + encode(self._generation.usage()) + b"}\n\n" if self._include else b""
