"""KV bookkeeping on the host: the slot pool and the radix tree of shared prefixes."""

from light_core.kv.pool import SlotPool
from light_core.kv.radix import Node, RadixCache

__all__ = ["Node", "RadixCache", "SlotPool"]
