"""Routing from hidden states: the reference against transformers' router, the kernel against the reference."""

import pytest
import torch

from light_sdk.ops.route_experts.reference import Routing, route_experts
from light_sdk.ops.route_tokens import reference

ROUTINGS = {
    "mixtral": Routing(8, 2, renormalize=True),
    "one": Routing(5, 1),
    "lite": Routing(64, 6),
    "v3": Routing(48, 4, "sigmoid", renormalize=True, scale=2.5, num_groups=6, top_groups=3, group_rule="top2_sum", biased=True),
}


def inputs(routing, num_tokens, size_e, dtype, router_dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, size_e, generator=generator).to(device, dtype)
    router = (torch.randn(routing.num_experts, size_e, generator=generator) * 2 * size_e**-0.5).to(device, router_dtype)
    bias = (torch.randn(routing.num_experts, generator=generator) * 0.3).to(device) if routing.biased else None
    return x, router, routing, bias


def run(function, arguments):
    """Results of `function`, in poisoned memory."""
    x, _, routing, _ = arguments
    weights = torch.full((len(x), routing.top_k), float("nan"), device=x.device)
    ids = torch.full(weights.shape, -1, dtype=torch.int32, device=x.device)
    function(weights, ids, *arguments)
    return weights, ids


def check(found, expected) -> None:
    """The same experts and weights, but for experts so close that the order of a sum may decide."""
    (weights, ids), (wanted, wanted_ids) = found, expected
    assert ids.dtype == torch.int32
    same = (ids == wanted_ids).all(-1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(weights[same], wanted[same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, wanted, rtol=2e-2, atol=2e-2)


def test_mixtral_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2))
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
        _, theirs, their_ids = router(x)
        weights, ids = run(reference.route_tokens, (x, router.weight, ROUTINGS["mixtral"], None))
    torch.testing.assert_close(
        *(torch.zeros(50, 8).scatter_(1, i.long(), w) for w, i in ((weights, ids), (theirs, their_ids))), rtol=1e-6, atol=1e-7
    )


def test_routers_in_float32_decide_what_half_precision_cannot() -> None:
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    router = torch.tensor([[1.0, 0, 0, 0], [1.0, 1e-4, 0, 0]])
    assert run(reference.route_tokens, (x, router, Routing(2, 1), None))[1].item() == 1
    assert run(reference.route_tokens, (x, router.bfloat16(), Routing(2, 1), None))[1].item() == 0


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float16"), ("float16", "float32")], ids="-".join)
@pytest.mark.parametrize("name", sorted(ROUTINGS))
@pytest.mark.parametrize(("num_tokens", "size_e"), [(1, 300), (5, 64), (19, 272)])
def test_kernel(num_tokens, size_e, name, dtypes, device, monkeypatch) -> None:
    """One part of the hidden size and several, runs of one block and of two, sizes that end within a block."""
    from light_sdk.ops.counters import arrival_counters
    from light_sdk.ops.route_tokens import kernel

    monkeypatch.setattr(kernel, "MAX_BLOCK_E", 32)
    arguments = inputs(ROUTINGS[name], num_tokens, size_e, *(getattr(torch, dtype) for dtype in dtypes), device)
    expected = run(reference.route_tokens, arguments)
    for processors in (1, 5):
        monkeypatch.setattr(kernel, "num_processors", lambda device, processors=processors: processors)
        found = run(kernel.route_tokens, arguments)
        check(found, expected)
        assert not arrival_counters(found[0].device, 1).any()
        assert all(torch.equal(*pair) for pair in zip(found, run(kernel.route_tokens, arguments), strict=True)), "the same every time"


@pytest.mark.parametrize("name", sorted(ROUTINGS))
def test_many_tokens(name, device, monkeypatch) -> None:
    """A product, then the choice: the library's product where the router has the tokens' dtype, else one of our own."""
    from light_sdk.ops.route_tokens import kernel

    monkeypatch.setattr(kernel, "MAX_TOKENS", 4)
    monkeypatch.setattr(kernel, "MAX_BLOCK_E", 32)
    called = []
    for name_of in ("router_logits", "route_experts"):
        found = getattr(kernel, name_of)

        def spy(*given, name_of=name_of, found=found):
            called.append(name_of)
            return found(*given)

        monkeypatch.setattr(kernel, name_of, spy)
    for num_tokens, router_dtype in ((4, torch.float16), (5, torch.float16), (6, torch.float32), (67, torch.float32)):
        arguments = inputs(ROUTINGS[name], num_tokens, 100, torch.float16, router_dtype, device)
        check(run(kernel.route_tokens, arguments), run(reference.route_tokens, arguments))
    assert called == ["route_experts"] + 2 * ["router_logits", "route_experts"]


@pytest.mark.parametrize(("num_tokens", "size_e", "num_experts"), [(1, 16, 5), (67, 100, 20)])
def test_routers_in_three_pieces(num_tokens, size_e, num_experts, device, monkeypatch) -> None:
    """Tokens and router in float32 show how much of the router the pieces have: all of it, where two would have 2^-17."""
    from light_sdk.ops.route_tokens import kernel

    monkeypatch.setattr(kernel, "MAX_BLOCK_E", 32)
    x, router, *_ = inputs(Routing(num_experts, 1), num_tokens, size_e, torch.float32, torch.float32, device)
    found = kernel.router_logits(x, router, True)
    x, router = x.double(), router.double()
    error = (found.double() - x @ router.T).abs() / (x.abs() @ router.abs().T)
    assert error.mean() <= 2**-23


def test_strided_tokens_and_no_tokens(device) -> None:
    from light_sdk.ops.route_tokens.kernel import route_tokens

    x, *rest = inputs(ROUTINGS["lite"], 3, 64, torch.float32, torch.float32, device)
    wide = torch.full((3, 100), float("nan"), device=device)
    wide[:, :64] = x
    check(run(route_tokens, (wide[:, :64], *rest)), run(reference.route_tokens, (x, *rest)))
    assert run(route_tokens, (x[:0], *rest))[1].shape == (0, 6)


def test_broken_tokens_stay_alone(device) -> None:
    from light_sdk.ops.route_tokens.kernel import route_tokens

    arguments = inputs(ROUTINGS["lite"], 4, 64, torch.float32, torch.float32, device)
    expected = run(reference.route_tokens, arguments)
    arguments[0][1, 3] = float("nan")
    weights, ids = run(route_tokens, arguments)
    assert weights[1].isnan().all() and len(set(ids[1].tolist())) == 6 and ids.min() >= 0 and ids.max() < 64
    rest = [0, 2, 3]
    check((weights[rest], ids[rest]), (expected[0][rest], expected[1][rest]))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 256, 3000])
@pytest.mark.parametrize(("routing", "size_e", "exact"), [(Routing(8, 2, renormalize=True), 4096, False), (Routing(64, 6), 2048, True)])
def test_kernel_of_published_shapes(num_tokens, routing, size_e, exact) -> None:
    from light_sdk.ops.route_tokens.kernel import route_tokens

    dtype = torch.float32 if exact else torch.bfloat16
    arguments = inputs(routing, num_tokens, size_e, torch.bfloat16, dtype, "cuda")
    (weights, ids), (wanted, wanted_ids) = run(route_tokens, arguments), run(reference.route_tokens, arguments)
    same = (ids == wanted_ids).all(-1)
    assert same.float().mean() > (0.99 if exact else 0.9)
    torch.testing.assert_close(weights[same], wanted[same], rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
def test_routers_of_v3_in_float32() -> None:
    """256 experts, whose router takes small blocks; three products of TF32 are as good as float32."""
    from light_sdk.ops.route_tokens.kernel import route_tokens

    routing = Routing(256, 8, "sigmoid", renormalize=True, scale=2.5, num_groups=8, top_groups=4, group_rule="top2_sum", biased=True)
    for num_tokens in (1, 40, 2000):
        x, router, _, bias = arguments = inputs(routing, num_tokens, 7168, torch.bfloat16, torch.float32, "cuda")
        weights, ids = run(route_tokens, arguments)
        exact = torch.full_like(weights, 0.0), torch.empty_like(ids)
        route_experts(*exact, (x.double() @ router.double().T).float(), routing, bias)
        same = (ids == exact[1]).all(-1)
        assert same.float().mean() > 0.99
        torch.testing.assert_close(weights[same], exact[0][same], rtol=1e-4, atol=1e-6)
