"""Routing: the reference against transformers' routers and by hand, the kernel against the reference."""

import pytest
import torch

from light_core.errors import ModelError
from light_sdk.ops.route_experts.reference import Routing, route_experts

ROUTINGS = {
    "mixtral": Routing(8, 2, renormalize=True),
    "qwen2": Routing(60, 4),
    "qwen3": Routing(128, 8, renormalize=True),
    "one": Routing(5, 1),
    "all": Routing(6, 6, scoring="sigmoid"),
    "deepseek-v2": Routing(160, 6, num_groups=8, top_groups=3, scale=16.0),
    "deepseek-v3": Routing(256, 8, "sigmoid", renormalize=True, scale=2.5, num_groups=8, top_groups=4, group_rule="top2_sum", biased=True),
    "odd-groups": Routing(15, 4, "sigmoid", num_groups=3, top_groups=2, group_rule="top2_sum"),
    "softmax-biased": Routing(12, 3, biased=True, renormalize=True),
}


def inputs(routing, num_tokens, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, routing.num_experts, generator=generator)
    bias = torch.randn(routing.num_experts, generator=generator) * 0.3 if routing.biased else None
    return logits.to(device, dtype), None if bias is None else bias.to(device)


def run(function, routing, logits, bias):
    """Results of `function`, in poisoned memory."""
    weights = torch.full((len(logits), routing.top_k), float("nan"), device=logits.device)
    ids = torch.full(weights.shape, -1, dtype=torch.int32, device=logits.device)
    function(weights, ids, logits, routing, bias)
    return weights, ids


def as_dense(routing, weights, ids):
    """`[T, X]`, so that the order in which experts were found does not matter."""
    return torch.zeros(len(ids), routing.num_experts, dtype=weights.dtype).scatter_(1, ids.long(), weights)


def compare_with(router, routing, hidden, bias=None):
    """Our weights against those of a transformers router with a random weight, expert by expert."""
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
        logits, theirs, their_ids = router(hidden)
    weights, ids = run(route_experts, routing, logits, bias)
    torch.testing.assert_close(as_dense(routing, weights, ids), as_dense(routing, theirs.float(), their_ids), rtol=1e-6, atol=1e-7)


def hidden_states(width=16):
    return torch.randn(50, width, generator=torch.Generator().manual_seed(0))


def test_mixtral_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2))
    compare_with(router, ROUTINGS["mixtral"], hidden_states())


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen_of_transformers(renormalize) -> None:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeTopKRouter

    config = Qwen2MoeConfig(hidden_size=16, num_experts=60, num_experts_per_tok=4, norm_topk_prob=renormalize)
    compare_with(Qwen2MoeTopKRouter(config), Routing(60, 4, renormalize=renormalize), hidden_states())


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2_of_transformers(method) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2TopkRouter

    groups = {"n_group": 4, "topk_group": 2} if method != "greedy" else {"n_group": 1, "topk_group": 1}
    config = DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=20,
        num_experts_per_tok=6,
        topk_method=method,
        routed_scaling_factor=16.0,
        **groups,
    )
    routing = Routing(20, 6, scale=16.0, num_groups=groups["n_group"], top_groups=groups["topk_group"])
    compare_with(DeepseekV2TopkRouter(config), routing, hidden_states())


@pytest.mark.parametrize("renormalize", [False, True])
def test_deepseek_v3_of_transformers(renormalize) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=24,
        num_experts_per_tok=5,
        n_group=4,
        topk_group=2,
        norm_topk_prob=renormalize,
    )
    router = DeepseekV3TopkRouter(config)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(2)) * 0.3
    router.e_score_correction_bias.copy_(bias)
    routing = Routing(24, 5, "sigmoid", renormalize, config.routed_scaling_factor, 4, 2, "top2_sum", biased=True)
    compare_with(router, routing, hidden_states(), bias)


def test_equal_scores_go_to_the_lower_expert() -> None:
    weights, ids = run(route_experts, Routing(6, 3), torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -5.0]]), None)
    assert ids.tolist() == [[1, 3, 0]] and weights[0, 0] == weights[0, 1]


def test_bias_chooses_and_does_not_count() -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 0.0, 1.0])
    weights, ids = run(route_experts, Routing(4, 1, "sigmoid", biased=True), logits, bias)
    assert ids.tolist() == [[3]] and weights.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring": "relu"}, "relu"),
        ({"group_rule": "mean"}, "mean"),
        ({"top_k": 9}, "9 experts of a token"),
        ({"top_k": 0}, "0 experts of a token"),
        ({"num_groups": 3}, "3 groups"),
        ({"num_groups": 4, "top_groups": 5}, "5 of 4 groups"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "leave 2 in 1"),
        ({"num_groups": 8, "top_groups": 4, "group_rule": "top2_sum"}, "no two best"),
    ],
)
def test_contradictions_are_refused(changes, message) -> None:
    with pytest.raises(ModelError, match=message):
        Routing(**({"num_experts": 8, "top_k": 2} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(ROUTINGS))
def test_kernel(name, dtype, device) -> None:
    from light_sdk.ops.route_experts.kernel import route_experts as kernel

    routing = ROUTINGS[name]
    for num_tokens in (1, 7):
        logits, bias = inputs(routing, num_tokens, dtype, device)
        expected, expected_ids = run(route_experts, routing, logits, bias)
        weights, ids = run(kernel, routing, logits, bias)
        if dtype == torch.float32:
            assert torch.equal(ids, expected_ids)
        # In bfloat16 experts tie exactly; both go to the lower one.
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
        assert ids.dtype == torch.int32 and torch.equal(ids, expected_ids)


def test_kernel_of_strided_logits(device) -> None:
    from light_sdk.ops.route_experts.kernel import route_experts as kernel

    routing = ROUTINGS["mixtral"]
    logits = inputs(Routing(12, 2), 3, device=device)[0][:, :8]
    weights, ids = run(kernel, routing, logits, None)
    expected, expected_ids = run(route_experts, routing, logits, None)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_broken_tokens_stay_alone(name, device) -> None:
    """A token whose logits are NaN has weights of NaN and experts that exist and differ; its neighbours are as ever."""
    from light_sdk.ops.route_experts.kernel import route_experts as kernel

    routing = ROUTINGS[name]
    logits, bias = inputs(routing, 4, device=device)
    expected, expected_ids = run(route_experts, routing, logits, bias)
    logits[1] = float("nan")
    for function in (route_experts, kernel):
        weights, ids = run(function, routing, logits, bias)
        assert weights[1].isnan().all() and len(set(ids[1].tolist())) == routing.top_k
        assert set(ids.flatten().tolist()) <= set(range(routing.num_experts))
        rest = [0, 2, 3]
        assert torch.equal(ids[rest], expected_ids[rest])
        torch.testing.assert_close(weights[rest], expected[rest], rtol=1e-5, atol=1e-6)


def test_kernel_of_no_tokens(device) -> None:
    from light_sdk.ops.route_experts.kernel import route_experts as kernel

    weights, ids = run(kernel, ROUTINGS["mixtral"], torch.empty(0, 8, device=device), None)
    assert weights.shape == ids.shape == (0, 2)
