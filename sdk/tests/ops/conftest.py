"""What the tests of all ops share: where kernels run, tolerances, and batches over a poisoned KV pool."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from light_core.types import Step
from light_sdk.ops import runs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def interpreter() -> None:
    """Kernels run on the CPU, where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the interpreter tests run where there is no GPU")
    if not INTERPRETED:
        pytest.fail("triton was imported before sdk/tests/conftest.py could choose the interpreter: set TRITON_INTERPRET=1")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel runs: interpreted on the CPU where there is no GPU, compiled where there is one."""
    if request.param == "cuda":
        return torch.device("cuda")
    request.getfixturevalue("interpreter")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def no_access_outside(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interpreted kernels find a forbidden page beside each of their tensors: behind it in one half of the tests, before it in
    the other. A test that ends in a segmentation fault has found a kernel that leaves its tensors."""
    if not INTERPRETED or torch.cuda.is_available():
        yield
        return
    from light_sdk.testing.guarded import guarded_launches

    with guarded_launches("behind" if zlib.crc32(request.node.nodeid.encode()) % 2 else "before"):
        yield


@pytest.fixture
def tolerances() -> Callable[[torch.dtype], dict[str, float]]:
    """Tolerances of results of order 1 by dtype: two units in the last place of the output, since accumulation is in
    float32 but a value just beside a rounding boundary may fall to either side, and once more on the way."""
    table = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    return lambda dtype: {"rtol": table[dtype], "atol": table[dtype]}


@dataclass
class Batch:
    """A step, its queries, and a pool of which only the slots in use are finite; `out` is NaN."""

    step: Step
    out: torch.Tensor
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Step]:
        return self.out, self.q, self.k_cache, self.v_cache, self.step


def build_batch(
    decodes: Sequence[int],
    prefills: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_seq_len: int | None = None,
    seed: int = 0,
) -> Batch:
    """`decodes` are lengths, `prefills` are (length, tokens of this chunk), `heads` is (H, K, D)."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = heads
    seq_lens = [*decodes, *(seq_len for seq_len, _ in prefills)]
    query_lens = [1] * len(decodes) + [query_len for _, query_len in prefills]
    num_slots, longest = sum(seq_lens) + 7, max_seq_len or max(seq_lens)
    # Slots 0 and S - 1 belong to nobody: masked reads land on the one, padding of graphs on the other.
    free = torch.randperm(num_slots - 2, generator=generator) + 1
    rows = torch.randperm(len(seq_lens) + 3, generator=generator)[: len(seq_lens)]
    unused = free[-1]
    slot_table = torch.full((len(seq_lens) + 3, longest), int(unused), dtype=torch.int32)
    k_cache, v_cache = (torch.full((num_slots, num_kv_heads, head_dim), float("nan")) for _ in range(2))
    slots, begin = [], 0
    for row, seq_len, query_len in zip(rows.tolist(), seq_lens, query_lens, strict=True):
        own = free[begin : begin + seq_len]
        slot_table[row, :seq_len] = own.int()
        for cache in (k_cache, v_cache):
            cache[own] = torch.randn(seq_len, num_kv_heads, head_dim, generator=generator)
        slots.append(own[seq_len - query_len :])
        begin += seq_len
    cu_seqlens = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_tokens = sum(query_lens)
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    positions = torch.cat([torch.arange(s - n, s) for s, n in zip(seq_lens, query_lens, strict=True)]).int()
    step = Step(
        token_ids=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        positions=positions.to(device),
        context_lens=(positions + 1).to(device),
        slots=torch.cat(slots).to(device),
        cu_seqlens_q=cu_seqlens.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        rows=rows.int().to(device),
        slot_table=slot_table.to(device),
        logits_rows=(cu_seqlens[1:].long() - 1).to(device),
        num_decodes=len(decodes),
        max_query_len=max(query_lens),
        max_seq_len=longest,
    )
    q, k_cache, v_cache = (tensor.to(device, dtype) for tensor in (q, k_cache, v_cache))
    return Batch(step, torch.full_like(q, float("nan")), q, k_cache, v_cache)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`build_batch`."""
    return build_batch


@dataclass
class LatentBatch:
    """A step, its queries, a pool of which only the slots in use are finite, and W_UK with W_UV; `out` is NaN."""

    step: Step
    out: torch.Tensor
    q: torch.Tensor
    cache: torch.Tensor
    kv_b: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Step]:
        return self.out, self.q, self.cache, self.kv_b, self.step


@pytest.fixture
def make_latents() -> Callable[..., LatentBatch]:
    """Batches of latent attention; `sizes` are heads, rank, key width without positions, rotary width, value width."""

    def make(decodes, prefills, sizes, dtype=torch.float32, device="cpu", max_seq_len=None) -> LatentBatch:
        num_heads, rank, key_dim, rotary_dim, value_dim = sizes
        heads = (num_heads, 1, rank + rotary_dim)
        batch = build_batch(decodes, prefills, heads, dtype=dtype, device=device, max_seq_len=max_seq_len)
        generator = torch.Generator().manual_seed(1)
        q = torch.randn(batch.step.num_tokens, num_heads, key_dim + rotary_dim, generator=generator)
        kv_b = torch.randn(num_heads, key_dim + value_dim, rank, generator=generator) * rank**-0.5
        out = torch.full((len(q), num_heads, value_dim), float("nan"), dtype=dtype, device=device)
        return LatentBatch(batch.step, out, q.to(device, dtype), batch.k_cache[:, 0], kv_b.to(device, dtype))

    return make


@pytest.fixture
def watch_few(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[tuple[int, bool]]]:
    """Makes six tokens after fifty few ones after a long prefix. Called with an op's module for Hopper, it gives a list that grows with
    each call of its kernels for decodes: how many, and whether they share a prefix."""
    monkeypatch.setattr(runs, "FEW_QUERIES", 6)
    monkeypatch.setattr(runs, "LEAST_PREFIX", 50)
    monkeypatch.setattr(runs, "LONGER", 10)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    def watch(hopper: ModuleType) -> list[tuple[int, bool]]:
        calls: list[tuple[int, bool]] = []
        decode_attention = hopper.decode_attention

        def watched(*given: Any) -> None:
            (step,) = (one for one in given if isinstance(one, Step))
            calls.append((step.num_decodes, step.shared_prefixes is not None))
            decode_attention(*given)

        monkeypatch.setattr(hopper, "decode_attention", watched)
        return calls

    return watch
