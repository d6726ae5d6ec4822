"""The weight loader: placements, completeness both ways, refused formats."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from light_core.engine.weights import check_names, checkpoint_files, fill_dummy, finish_loading, load_weights, named_parameters
from light_core.errors import CheckpointError
from light_core.types import Placement, Shard, WeightPlan


def modules(**shapes: tuple[int, ...]) -> dict[str, nn.Module]:
    """Modules "pre", "layers.0" and "post" with NaN parameters: `pre_w=(4, 2)` makes pre.w."""
    built: dict[str, nn.Module] = {"pre": nn.Module(), "layers.0": nn.Module(), "post": nn.Module()}
    for name, shape in shapes.items():
        prefix, _, attribute = name.partition("_")
        owner = built["layers.0" if prefix == "layer" else prefix]
        owner.register_parameter(attribute, nn.Parameter(torch.full(shape, float("nan")), requires_grad=False))
    return built


def test_merges_slices_and_transforms(tmp_path: Path) -> None:
    q, k, t = torch.randn(4, 3), torch.randn(2, 3), torch.randn(3, 5)
    save_file({"q": q, "k": k}, tmp_path / "a.safetensors")
    save_file({"t": t}, tmp_path / "b.safetensors")
    built = modules(layer_qk=(6, 3), post_t=(5, 3))
    plan = WeightPlan(
        (
            Placement("q", "layers.0.qk", 0, 4),
            Placement("k", "layers.0.qk", 4, 2),
            Placement("t", "post.t", transform=lambda x: x.T),
        )
    )
    seen: list[float] = []
    load_weights(built, plan, tmp_path, "cpu", seen.append)
    parameters = named_parameters(built)
    assert torch.equal(parameters["layers.0.qk"], torch.cat([q, k]))
    assert torch.equal(parameters["post.t"], t.T)
    assert seen == sorted(seen) and 0 < seen[-1] <= 1


def test_one_tensor_may_fill_two_parameters(tmp_path: Path) -> None:
    both = torch.randn(4, 3)
    save_file({"both": both}, tmp_path / "model.safetensors")
    built = modules(layer_a=(1, 3), layer_b=(3, 3))
    plan = WeightPlan(
        (Placement("both", "layers.0.a", transform=lambda x: x[:1]), Placement("both", "layers.0.b", transform=lambda x: x[1:]))
    )
    load_weights(built, plan, tmp_path, "cpu")
    assert torch.equal(named_parameters(built)["layers.0.b"], both[1:])


def test_further_checkpoints_are_read_and_consumed_like_the_first(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.full((2,), 2.0), "c": torch.ones(1)}, tmp_path / "tower" / "model.safetensors")
    plan = WeightPlan((Placement("a", "pre.a"), Placement("b", "post.b")), folders=(str(tmp_path / "tower"),))
    with pytest.raises(CheckpointError, match="1 tensors are not in the weight plan: c"):
        load_weights(modules(pre_a=(2,), post_b=(2,)), plan, tmp_path, "cpu")
    built = modules(pre_a=(2,), post_b=(2,))
    load_weights(built, replace(plan, ignored=("c",)), tmp_path, "cpu")
    assert named_parameters(built)["post.b"].tolist() == [2.0, 2.0]
    with pytest.raises(CheckpointError, match="no weights"):
        load_weights(built, replace(plan, folders=(str(tmp_path / "nowhere"),)), tmp_path, "cpu")


def scaled(placement_extras: tuple[str, ...] = ("w_scale",)) -> WeightPlan:
    return WeightPlan((Placement("w", "pre.w", transform=lambda w, s: w.float() * s, extras=placement_extras),), prefixes=("model.",))


@pytest.mark.parametrize("scale_file", ["a", "w", "z"], ids=["before", "together", "after"])
def test_a_transform_may_take_further_tensors(tmp_path: Path, scale_file: str) -> None:
    """Whichever file they are in; they are consumed by it."""
    w, scale = torch.randn(4, 3).to(torch.float8_e4m3fn), torch.rand(4, 1)
    files: dict[str, dict[str, torch.Tensor]] = {scale_file: {"model.w_scale": scale}}
    files.setdefault("w", {})["model.w"] = w
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    built = modules(pre_w=(4, 3))
    load_weights(built, scaled(), tmp_path, "cpu")
    assert torch.equal(named_parameters(built)["pre.w"], w.float() * scale)
    check_names(built, scaled(), ["model.w", "model.w_scale"], tmp_path)


def test_a_further_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    save_file({"model.w": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="w_scale"):
        load_weights(modules(pre_w=(4, 3)), scaled(), tmp_path, "cpu")
    with pytest.raises(CheckpointError, match="w_scale"):
        check_names(modules(pre_w=(4, 3)), scaled(), ["model.w"], tmp_path)


def test_shard_reads_its_own_part(tmp_path: Path) -> None:
    w = torch.arange(24.0).view(4, 6)
    save_file({"w": w}, tmp_path / "model.safetensors")
    built = modules(layer_w=(4, 3))
    load_weights(built, WeightPlan((Placement("w", "layers.0.w", shard_dim=1),)), tmp_path, "cpu", shard=Shard(1, 2))
    assert torch.equal(named_parameters(built)["layers.0.w"], w[:, 3:])


def test_ties_share_memory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    built = modules(pre_w=(2, 2), post_w=(2, 2))
    load_weights(built, WeightPlan((Placement("w", "pre.w"),), ties={"post.w": "pre.w"}), tmp_path, "cpu")
    parameters = named_parameters(built)
    assert parameters["post.w"] is parameters["pre.w"]
    assert torch.equal(parameters["post.w"], torch.ones(2, 2))


@pytest.mark.parametrize(
    ("tensors", "plan", "words"),
    [
        ({"w": (2, 2), "extra": (1,)}, WeightPlan((Placement("w", "pre.w"),)), ["not in the weight plan", "extra"]),
        ({"other": (1,)}, WeightPlan((Placement("w", "pre.w"),), ignored=("other",)), ["not set", "pre.w"]),
        ({"a": (1, 2)}, WeightPlan((Placement("a", "pre.w", 0, 1),)), ["not set", "pre.w"]),
        ({"w": (2, 3)}, WeightPlan((Placement("w", "pre.w"),)), ["(2, 3)", "(2, 2)"]),
        ({"w": (2, 2)}, WeightPlan((Placement("w", "pre.nothing"),)), ["pre.nothing", "no such parameter"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, tensors: dict[str, tuple[int, ...]], plan: WeightPlan, words: list[str]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(modules(pre_w=(2, 2)), plan, tmp_path, "cpu")
    assert all(word in caught.value.block() for word in words)


def test_prefixes_ignored_and_optional(tmp_path: Path) -> None:
    save_file({"model.w": torch.ones(2, 2), "model.inv_freq": torch.ones(3)}, tmp_path / "model.safetensors")
    built = modules(pre_w=(2, 2), pre_b=(2,))
    built["pre"].b.data.zero_()
    plan = WeightPlan((Placement("w", "pre.w"), Placement("b", "pre.b", optional=True)), ignored=(r".*inv_freq",), prefixes=("model.",))
    load_weights(built, plan, tmp_path, "cpu")
    assert torch.equal(named_parameters(built)["pre.b"], torch.zeros(2))


def test_duplicate_tensor_is_an_error(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.zeros(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="twice"):
        load_weights(modules(pre_w=(2, 2)), WeightPlan((Placement("w", "pre.w"),)), tmp_path, "cpu")


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files(tmp_path)
    assert "pytorch_model.bin" in caught.value.block()
    assert caught.value.remedy == f"convert to safetensors: light convert {tmp_path} NEW_FOLDER"


def test_pickles_of_a_trainer_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="has no weights") as caught:
        checkpoint_files(tmp_path)
    assert "light convert" not in caught.value.remedy


def test_index_names_missing_and_outside_files(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks 1 of 1"):
        checkpoint_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint_files(tmp_path)


def test_dummy_weights_repeat_and_are_finite() -> None:
    plan = WeightPlan(())
    first, second = modules(pre_w=(8, 8), pre_bias=(8,), post_n=(8,)), modules(pre_w=(8, 8), pre_bias=(8,), post_n=(8,))
    fill_dummy(first, plan, seed=3)
    fill_dummy(second, plan, seed=3)
    one, two = named_parameters(first), named_parameters(second)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert 0.01 < one["pre.w"].std() < 0.03 and one["pre.bias"].abs().max() == 0 and one["post.n"].min() == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"w": 3}}'])
def test_an_index_that_is_none_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files(tmp_path)
    assert "model.safetensors.index.json" in caught.value.error and caught.value.cause


@pytest.mark.parametrize("kept", [0.5, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n", ""])
def test_a_file_that_was_not_downloaded_to_its_end_says_so(tmp_path: Path, kept: float | str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2, 2)}, file)
    whole = file.read_bytes()
    file.write_bytes(kept.encode() if isinstance(kept, str) else whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError) as caught:
        load_weights(modules(pre_w=(2, 2)), WeightPlan((Placement("w", "pre.w"),)), tmp_path, "cpu")
    assert str(file) in caught.value.error and "download" in caught.value.remedy


def test_weights_in_a_second_layout_are_left_alone(tmp_path: Path) -> None:
    """Mistral's folders hold the same weights as consolidated.safetensors, under other names."""
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    save_file({"w": torch.zeros(2, 2), "tok_embeddings.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    built = modules(pre_w=(2, 2))
    load_weights(built, WeightPlan((Placement("w", "pre.w"),)), tmp_path, "cpu")
    assert torch.equal(named_parameters(built)["pre.w"], torch.ones(2, 2))


def test_parts_are_told_when_loading_is_finished() -> None:
    class Part(nn.Module):
        calls = 0

        def finish_loading(self) -> None:
            self.calls += 1

    shared = Part()
    built = {"pre": nn.Sequential(nn.Identity(), shared), "post": nn.Sequential(Part(), nn.Sequential(Part()))}
    finish_loading(built)
    assert [part.calls for part in (shared, built["post"][0], built["post"][1][0])] == [1, 1, 1]
