"""Latents written, then attended to: the reference against a step of one token by hand, all else against the reference."""

from dataclasses import dataclass

import pytest
import torch

from light_core.types import Step
from light_sdk.ops.latent_attention import cpu, reference

TINY, ODD, REAL = (4, 16, 16, 8, 16), (5, 24, 12, 6, 20), (16, 512, 128, 64, 128)
"""Heads, rank of the latents, key width without positions, rotary width, value width."""
MIXES = {
    "one token": ([1], []),
    "decodes": ([2, 31, 33, 64, 1], []),
    "more decodes than a block": ([3 + i % 5 for i in range(20)], []),
    "prefill": ([], [(1, 1), (37, 30)]),
    "mixed": ([65, 1, 40], [(40, 40), (50, 3)]),
}


@dataclass
class Inputs:
    """What the op takes; queries and products are views into wider tensors, and the step's own slots are not yet written."""

    out: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor
    weight: torch.Tensor
    cos_sin: torch.Tensor
    interleaved: bool
    cache: torch.Tensor
    kv_b: torch.Tensor
    step: Step

    def run(self, implementation, scale: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, turned queries and cache, on copies."""
        self.step.shared.clear()
        out, q, cache = self.out.clone(), self.q.clone(), self.cache.clone()
        implementation(out, q, self.kv, self.weight, 1e-5, self.cos_sin, self.interleaved, cache, self.kv_b, self.step, scale)
        return out, q, cache


@pytest.fixture
def make_inputs(make_latents):
    def make(mix, sizes, interleaved=True, dtype=torch.float32, device="cpu") -> Inputs:
        batch = make_latents(*mix, sizes, dtype=dtype, device=device)
        (num_tokens, num_heads, _), (_, rank, key_dim, rotary_dim, _) = batch.q.shape, sizes
        generator = torch.Generator().manual_seed(2)
        product = torch.randn(num_tokens, num_heads * (key_dim + rotary_dim) + rank + rotary_dim, generator=generator).to(device, dtype)
        q, kv = product.split((num_heads * (key_dim + rotary_dim), rank + rotary_dim), dim=-1)
        angles = torch.rand(num_tokens, rotary_dim // 2, generator=generator) * 6
        weight = (1 + 0.1 * torch.randn(rank, generator=generator)).to(device, dtype)
        batch.cache[batch.step.slots] = float("nan")
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(device)
        return Inputs(batch.out, q.view(num_tokens, num_heads, -1), kv, weight, cos_sin, interleaved, batch.cache, batch.kv_b, batch.step)

    return make


def test_definition(make_inputs, tolerances) -> None:
    """A request of one token attends to nothing but its own latent: W_UV times the latent, whatever the scores are."""
    inputs = make_inputs(([1], []), TINY)
    out, _, cache = inputs.run(reference.latent_attention)
    x = inputs.kv[0, :16].double()
    latent = x / (x.square().mean() + 1e-5).sqrt() * inputs.weight.double()
    torch.testing.assert_close(cache[inputs.step.slots[0], :16].double(), latent, **tolerances(torch.float32))
    torch.testing.assert_close(out[0].double(), inputs.kv_b[:, 16:].double() @ latent, **tolerances(torch.float32))


def check(inputs: Inputs, implementation, tolerance: dict[str, float], scale: float = 0.3) -> None:
    expected = inputs.run(reference.latent_attention, scale)
    assert expected[0].isfinite().all()
    for got, want in zip(inputs.run(implementation, scale), expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, **tolerance)


@pytest.mark.parametrize("mix", MIXES)
def test_cpu(mix, make_inputs, tolerances) -> None:
    check(make_inputs(MIXES[mix], ODD), cpu.latent_attention, tolerances(torch.float32))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", [TINY, ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("mix", MIXES)
def test_kernel(mix, sizes, interleaved, make_inputs, device, tolerances) -> None:
    from light_sdk.ops.latent_attention.kernel import latent_attention

    check(make_inputs(MIXES[mix], sizes, interleaved, device=device), latent_attention, tolerances(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", ["decodes", "mixed"])
def test_kernel_half(mix, dtype, make_inputs, device, tolerances) -> None:
    from light_sdk.ops.latent_attention.kernel import latent_attention

    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    # Absorbing rounds queries and sums in the place of keys and values: twice the unit of a result.
    tolerance = {key: 2 * value for key, value in tolerances(dtype).items()}
    check(make_inputs(MIXES[mix], ODD, dtype=dtype, device=device), latent_attention, tolerance)


def test_kernel_of_the_published_widths(make_inputs, device, tolerances) -> None:
    from light_sdk.ops.latent_attention.kernel import latent_attention

    check(make_inputs(([37, 5], []), REAL, device=device), latent_attention, tolerances(torch.float32), 192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("num_decodes", [1, 7, 33, 64, 200, 300])
@pytest.mark.parametrize("name", ["latent_attention", "with_cudnn"])
def test_steps_of_decodes(name, num_decodes, make_inputs, tolerances) -> None:
    from light_sdk.ops.latent_attention import kernel

    inputs = make_inputs(([40 + 17 * i % 1500 for i in range(num_decodes)], []), REAL, dtype=torch.bfloat16, device="cuda")
    tolerance = {key: 2 * value for key, value in tolerances(torch.bfloat16).items()}
    check(inputs, getattr(kernel, name), tolerance, 192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("num_decodes", [1, 33])
def test_layers_in_a_cuda_graph(num_decodes, make_inputs, tolerances) -> None:
    """Four layers one after the other, as kernels that start before the one before has ended: each with latents, queries and
    weights of its own, each right at every replay."""
    from light_sdk.ops.latent_attention.kernel import latent_attention

    layers = [make_inputs(([300 + i for i in range(num_decodes)], []), REAL, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    for layer in layers:
        layer.step = layers[0].step
        layer.kv_b = torch.randn_like(layer.kv_b) * 512**-0.5
    expected = [layer.run(reference.latent_attention, 0.07) for layer in layers]
    queries = [layer.q.clone() for layer in layers]

    def run() -> None:
        for layer, q in zip(layers, queries, strict=True):
            layer.q.copy_(q)
        for layer in layers:
            arguments = (layer.kv, layer.weight, 1e-5, layer.cos_sin, True, layer.cache, layer.kv_b, layer.step, 0.07)
            latent_attention(layer.out, layer.q, *arguments)

    layers[0].step.shared.clear()
    run()
    layers[0].step.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        for layer in layers:
            layer.out.fill_(float("nan"))
            layer.cache[layer.step.slots] = float("nan")
        graph.replay()
        for layer, (out, q, cache) in zip(layers, expected, strict=True):
            tolerance = {key: 2 * value for key, value in tolerances(torch.bfloat16).items()}
            torch.testing.assert_close(layer.out, out, **tolerance)
            torch.testing.assert_close(layer.q, q, **tolerance)
            torch.testing.assert_close(layer.cache, cache, equal_nan=True, **tolerance)
