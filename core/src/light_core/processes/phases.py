"""What a person sees while the engine loads: a bar for what takes long, and where the time went."""

import sys
import time
from typing import Never, TextIO

from tqdm import tqdm

__all__ = ["LoadingLog"]

BARS = {"weights": "loading weights", "graphs": "capturing CUDA graphs"}


class LoadingLog:
    """Takes the engine's progress and times its phases; on a terminal it draws a bar for each phase of `BARS`.

    Args:
        stream: where bars go if it is a terminal; None takes standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._times: dict[str, float] = {}
        self._phase: str | None = None
        self._since = time.perf_counter()
        self._bar: tqdm[Never] | None = None

    def __call__(self, phase: str, share: float) -> None:
        """`share` (0 to 1) of `phase` is done."""
        if phase != self._phase:
            self._end_phase()
            self._phase = phase
            if phase in BARS and self._stream.isatty():
                self._bar = _bar(BARS[phase], self._stream)
        if self._bar is not None:
            self._bar.update(100 * share - self._bar.n)
            if share >= 1.0:  # what is logged next must not meet the bar
                self._close_bar()

    def finish(self) -> str:
        """Ends the last phase; "2.1 s: plugins 0.9, weights 0.1" of the phases that were seen."""
        self._end_phase()
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._times.items())
        return f"{sum(self._times.values()):.1f} s: {parts}"

    def _end_phase(self) -> None:
        self._close_bar()
        now = time.perf_counter()
        if self._phase is not None:
            self._times[self._phase] = self._times.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = None, now

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bar(text: str, stream: TextIO) -> "tqdm[Never]":
    return tqdm(total=100, desc=text, file=stream, leave=False, bar_format="{l_bar}{bar:30}| {elapsed}")
