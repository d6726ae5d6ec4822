"""Writing keys and values: each token lands in its slot bit by bit, and every other slot stays."""

import pytest
import torch

from light_sdk.ops.write_kv import reference

CASES = [(1, 1, 16), (5, 3, 80), (33, 8, 128)]
"""T, K, D."""


def check(write_kv, case, dtype, device) -> None:
    num_tokens, num_kv_heads, head_dim = case
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(num_tokens, 3 * num_kv_heads, head_dim, generator=generator).to(device, dtype)
    k, v = fused[:, num_kv_heads : 2 * num_kv_heads], fused[:, 2 * num_kv_heads :]
    slots = (torch.randperm(100, generator=generator)[:num_tokens]).to(device)
    k_cache, v_cache = (torch.full((100, num_kv_heads, head_dim), float("nan"), dtype=dtype, device=device) for _ in range(2))
    write_kv(k, v, k_cache, v_cache, slots)
    for t, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache[slot], k[t]) and torch.equal(v_cache[slot], v[t])
    others = torch.ones(100, dtype=torch.bool, device=device)
    others[slots] = False
    assert k_cache[others].isnan().all() and v_cache[others].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case, dtype) -> None:
    check(reference.write_kv, case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, dtype, device) -> None:
    from light_sdk.ops.write_kv.kernel import write_kv

    check(write_kv, case, dtype, device)


@pytest.mark.gpu
def test_pool_beyond_int32() -> None:
    from light_sdk.ops.write_kv.kernel import write_kv

    num_slots = 2**31 // 1024 + 1000
    k_cache, v_cache = (torch.zeros(num_slots, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    k, v = (torch.randn(3, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    slots = torch.tensor([num_slots - 1, 5, num_slots - 500], device="cuda")
    write_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[slots], k) and torch.equal(v_cache[slots], v)
    assert int(k_cache.count_nonzero()) == int(k.count_nonzero())
