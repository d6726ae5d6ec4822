"""The KV pool's slots: which are free. Token-granular, so nothing is ever wasted to rounding.

Not here: the memory itself (the runner's), and who holds a slot (rows of the scheduler, and the radix tree). Caller:
the scheduler, from one thread.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["SlotPool"]

Slots = npt.NDArray[np.int32]


class SlotPool:
    """A stack of free slot ids.

    The last slot, `num_slots - 1`, takes the padding of CUDA graphs and is never handed out.

    Args:
        num_slots: slots of the KV memory, the padding slot included; at least 2.
    """

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 2, f"a pool of {num_slots} slots has none to hand out"
        self.capacity = num_slots - 1
        # The free slots are _stack[:num_free], the next one at the end; descending, so that a new pool gives 0, 1, 2, …
        self._stack: Slots = np.arange(self.capacity - 1, -1, -1, dtype=np.int32)
        self._is_free = np.ones(self.capacity, dtype=np.bool_)
        self.num_free = self.capacity

    @property
    def num_used(self) -> int:
        """Slots that are handed out."""
        return self.capacity - self.num_free

    def alloc(self, count: int) -> Slots:
        """Hands out `count` slots: a new int32 array [count]. The caller has made sure that so many are free."""
        assert 0 <= count <= self.num_free, f"{count} slots wanted, {self.num_free} free"
        slots = self._stack[self.num_free - count : self.num_free][::-1].copy()
        self._is_free[slots] = False
        self.num_free -= count
        return slots

    def free(self, slots: Slots) -> None:
        """Takes back `slots`, int32 [n], each handed out and not yet freed."""
        count = len(slots)
        if count == 0:
            return
        assert not self._is_free[slots].any(), "a slot is freed twice"
        self._is_free[slots] = True
        self._stack[self.num_free : self.num_free + count] = slots[::-1]
        self.num_free += count

    def check(self) -> None:
        """Asserts that the stack holds every free slot once. O(num_slots)."""
        free = self._stack[: self.num_free]
        assert np.array_equal(np.sort(free), np.flatnonzero(self._is_free)), "the stack of free slots is corrupt"
