"""Products by cuBLASLt: which algorithm is taken for which number of tokens, and (GPU) that each of the data files is right."""

import itertools
import json
from importlib import resources
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from light_sdk.ops.linear import blas
from light_sdk.ops.linear.blas import Algorithm, Kind, Product, product, product_to, suggested_algorithms, tuned_algorithm, version

FILES = sorted(resources.files("light_sdk.ops.linear").joinpath("configs").iterdir(), key=lambda file: file.name)
BLAS = [(file.name, json.loads(file.read_text())["blas"]) for file in FILES]
TUNED = [
    (kind, tuple(map(int, shape.split("x"))), int(tokens), Algorithm(**entry))
    for _, blas in BLAS
    for kind in get_args(Kind)
    for shape, entries in blas[kind].items()
    for tokens, entry in entries.items()
    if entry != "blas"
]


@pytest.mark.parametrize(
    ("num_tokens", "tile"), [(32, None), (33, 1), (64, 1), (65, None), (96, None), (97, None), (128, None), (129, 3), (256, 3), (257, None)]
)
def test_an_entry_is_for_more_than_half_of_its_tokens(num_tokens, tile) -> None:
    entries = {"256": {"tile": 3, "cluster": 5}, "64": {"tile": 1, "cluster": 5, "custom": 2}, "96": "blas"}
    found = tuned_algorithm(entries, num_tokens)
    assert found == {None: None, 1: Algorithm(1, 5, 2), 3: Algorithm(3, 5)}[tile]


@pytest.mark.parametrize(("name", "blas"), BLAS)
def test_files(name, blas) -> None:
    assert blas["version"] >= 130000 and set(blas) == {"version", *get_args(Kind)}, name
    for entries in (entries for kind in get_args(Kind) for entries in blas[kind].values()):
        assert list(map(int, entries)) == sorted(map(int, entries))


def test_elsewhere_the_product_is_torchs() -> None:
    x, weight, bias, out = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8), torch.randn(3, 8)
    assert torch.equal(product(x, weight), F.linear(x, weight)) and torch.equal(product(x, weight, bias), F.linear(x, weight, bias))
    expected = torch.addmm(out, x, weight.t())
    product_to(out, x, weight, adds=True)
    assert torch.equal(out, expected)
    product_to(out, x, weight)
    assert torch.equal(out, torch.mm(x, weight.t()))


def test_an_algorithm_that_cublas_lacks_is_told_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(blas, "version", lambda: 7)
    monkeypatch.setattr(blas, "device_name", lambda device: "a GPU")
    entries = {"64": {"tile": 1, "cluster": 5}, "128": {"tile": 2, "cluster": 5}}
    content = {"version": 7, "plain": {"24x8": entries}, "onto": {}, "biased": {}}
    monkeypatch.setattr(blas, "read_configs", lambda package, name: {"blas": content})
    made: list[tuple] = []

    def refuse(*arguments) -> None:
        made.append(arguments)
        raise ValueError("cuBLASLt 7 has no such algorithm")

    monkeypatch.setattr(blas, "Product", refuse)
    device = torch.device("cuda", 9)
    for num_tokens in (60, 64):
        tuned = blas._tuned(device, 24, 8, "plain", num_tokens)
        assert tuned == (Algorithm(1, 5), 24, 8, 128, "plain")
        assert blas._product(*tuned, device) is None
    assert made == [tuned] and caplog.text.count("no such algorithm") == 1
    assert all(blas._tuned(device, 24, 8, kind, 64) is None for kind in ("onto", "biased"))
    assert blas._tuned(device, 24, 9, "plain", 64) is None


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def check(call: Product, n: int, k: int, tokens: int, kind: Kind, tolerances) -> None:
    x, weight, out = random(tokens, k), random(n, k) * k**-0.5, random(tokens, n)
    bias = random(n) if kind == "biased" else None
    expected = x.double() @ weight.double().T + (out.double() if kind == "onto" else 0)
    call(x, weight, out, bias)
    if bias is not None:
        expected += bias.double()
    torch.testing.assert_close(out.double(), expected, **{name: 2 * value for name, value in tolerances(torch.bfloat16).items()})


@pytest.mark.gpu
def test_algorithms_of_the_files(tolerances) -> None:
    """Each with its own number of tokens, then with others that it is taken for."""
    if any(version() != blas["version"] for _, blas in BLAS):
        pytest.skip(f"measured with another cuBLAS than {version()}")
    for kind, (n, k), tokens, algorithm in TUNED:
        call = Product(algorithm, n, k, max(tokens, 1024), kind)
        for count in (tokens, tokens // 2 + 1, tokens - 7):
            check(call, n, k, count, kind, tolerances)


@pytest.mark.gpu
def test_the_op_takes_them_and_can_be_captured(tolerances) -> None:
    from light_sdk.ops.linear.kernel import linear

    weight = random(28672, 4096) * 4096**-0.5
    x = random(256, 4096)
    with torch.inference_mode():
        found = linear(x, weight)
        torch.testing.assert_close(found.double(), x.double() @ weight.double().T, **tolerances(torch.bfloat16))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear(x, weight)
        graph.replay()
        assert torch.equal(captured, found)
        gaps, odd = random(256, 8192)[:, :4096], random(256 * 4096 + 8)[8:].view(256, 4096)
        for other in (gaps, odd):  # rows with gaps, an address that is not aligned
            torch.testing.assert_close(linear(other, weight).double(), other.double() @ weight.double().T, **tolerances(torch.bfloat16))


@pytest.mark.gpu
def test_what_cublas_suggests_can_be_named(tolerances) -> None:
    suggested = suggested_algorithms(6144, 4096, 512)
    if not suggested:
        pytest.skip("cuBLAS has other kernels on this GPU")
    for algorithm, kind in itertools.product(suggested, get_args(Kind)):
        call = Product(algorithm, 6144, 4096, 512, kind)
        for _ in range(2):  # with another bias, too
            check(call, 6144, 4096, 512, kind, tolerances)
    with pytest.raises(ValueError, match="no Algorithm"):
        Product(Algorithm(9999, 9999), 6144, 4096, 512, "plain")
