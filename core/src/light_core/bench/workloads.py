"""Request mixes of token ids: the seven that Light is compared with, and free ones. The same requests for the same seed.

Not here: how they are sent (`offline`, `serving`).
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from light_core.errors import ConfigError

__all__ = ["WORKLOADS", "Lengths", "Prompt", "Workload", "choose_workloads", "create_requests"]

Prompt = tuple[list[int], int]
"""Token ids of a prompt, and the tokens to generate."""

FIRST_TOKEN, END_TOKEN = 100, 30_000
"""Range that tokens are drawn from, where the vocabulary is large enough: ids below are often special."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens: all `high`, or log-normal where `sigma` is not 0.

    Attributes:
        low, high: bounds, both reached.
        mu, sigma: of the logarithm, before lengths are cut to the bounds and to whole numbers.
    """

    low: int
    high: int
    mu: float = 0.0
    sigma: float = 0.0

    def draw(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """`count` lengths; a fixed length takes nothing from `rng`."""
        if self.sigma == 0.0:
            return np.full(count, self.high, dtype=np.int64)
        return np.clip(rng.lognormal(self.mu, self.sigma, count), self.low, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Workload:
    """A mix of requests that arrive as the runner says.

    Attributes:
        name: as `--workload` spells it; "random" for a free one.
        num_prompts: requests.
        input_len: of each prompt, without the shared prefix.
        output_len: tokens that each generates.
        shared_len: tokens that all prompts begin with.
        length_scale: all lengths are multiplied by it, at least 1 is left.
    """

    name: str
    num_prompts: int
    input_len: Lengths
    output_len: Lengths
    shared_len: int = 0
    length_scale: float = 1.0

    @property
    def max_len(self) -> int:
        """The longest that a request can be, prompt and output."""
        shared = self._scaled(self.shared_len) if self.shared_len else 0
        return shared + self._scaled(self.input_len.high) + self._scaled(self.output_len.high)

    def _scaled(self, length: int) -> int:
        return max(1, round(length * self.length_scale))


def _fixed(length: int) -> Lengths:
    return Lengths(length, length)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode-1", 1, _fixed(128), _fixed(512)),
        Workload("decode-64", 64, _fixed(512), _fixed(256)),
        Workload("decode-256", 256, _fixed(512), _fixed(256)),
        Workload("prefill", 64, _fixed(4096), _fixed(1)),
        Workload("mixed", 1000, Lengths(4, 4096, 5.8, 1.0), Lengths(4, 1024, 5.0, 0.9)),
        Workload("shared-prefix", 512, _fixed(128), _fixed(64), shared_len=2048),
        Workload("long", 16, _fixed(32_768), _fixed(128)),
    )
}


def choose_workloads(
    names: str | None, num_prompts: int | None, input_len: int | None, output_len: int | None, length_scale: float, default_prompts: int
) -> list[Workload]:
    """What the options of a command ask for.

    Args:
        names: comma separated names of `WORKLOADS`, "all", or None for one of fixed lengths.
        num_prompts: requests; of a named workload its first ones. None for all of them, or `default_prompts`.
        input_len, output_len: of the one with fixed lengths; None for 256 and 128.
        length_scale: see `Workload`.
        default_prompts: requests of the one with fixed lengths.

    Raises:
        ConfigError: an unknown name, or lengths beside a name.
    """
    if names is None:
        free = Workload("random", num_prompts or default_prompts, _fixed(input_len or 256), _fixed(output_len or 128))
        return [replace(free, length_scale=length_scale)]
    if input_len is not None or output_len is not None:
        raise ConfigError("--workload goes without --input-len and --output-len", "a workload has lengths of its own", "use --length-scale")
    listed = list(WORKLOADS) if names == "all" else names.split(",")
    if unknown := [name for name in listed if name not in WORKLOADS]:
        raise ConfigError(f"--workload {unknown[0]!r} is not known", f"known: {', '.join(WORKLOADS)}, all", "spell it as one of them")
    chosen = [WORKLOADS[name] for name in listed]
    return [replace(one, num_prompts=min(num_prompts or one.num_prompts, one.num_prompts), length_scale=length_scale) for one in chosen]


def create_requests(workload: Workload, vocab_size: int, seed: int) -> list[Prompt]:
    """The requests of `workload`, in order of arrival; the same for the same `vocab_size` and `seed`.

    Fewer requests of a named workload are the first ones of all of it.
    """
    rng = np.random.default_rng(seed)
    whole = WORKLOADS.get(workload.name, workload).num_prompts
    inputs, outputs = workload.input_len.draw(whole, rng), workload.output_len.draw(whole, rng)
    end = min(vocab_size, END_TOKEN)
    first = min(FIRST_TOKEN, end // 2)
    shared = rng.integers(first, end, workload._scaled(workload.shared_len)).tolist() if workload.shared_len else []
    return [
        (shared + rng.integers(first, end, workload._scaled(int(length))).tolist(), workload._scaled(int(output)))
        for length, output in zip(inputs[: workload.num_prompts], outputs)
    ]
