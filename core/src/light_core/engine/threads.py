"""How many threads the engine process gives to torch on a CPU, where it shares the cores with the processes around it.

Not here: the offline API, which leaves torch's threads as the caller has them.
"""

__all__ = ["SMALL_BYTES", "serving_threads"]

SMALL_BYTES = 64 << 20
"""Weights that a core reads in a millisecond or two. Products of such a model are so short that a second thread gains a
third at best, and each of them waits for all its threads: one that the HTTP process keeps off its core for a time slice
of milliseconds stops the step."""


def serving_threads(weight_bytes: int, num_threads: int) -> int:
    """Threads for a model of `weight_bytes`, of `num_threads` that torch would take: all, but one less if it is small."""
    return max(1, num_threads - 1) if weight_bytes < SMALL_BYTES else num_threads
