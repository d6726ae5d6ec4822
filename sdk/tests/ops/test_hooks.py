"""Registration: every op is declared, every target exists, and each machine gets the kernel that is meant for it."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from importlib import resources

import pytest

from light_core.ops import KernelRegistry, Machine, OpTable
from light_sdk import hooks
from light_sdk.ops.attention.tuning import DecodeConfig, PrefillConfig

OPS = (
    "act_and_mul",
    "activation",
    "attend_runs",
    "attention",
    "fused_experts",
    "fused_experts_fp8_block",
    "gated_linear",
    "latent_attention",
    "layer_norm",
    "linear",
    "linear_fp8_block",
    "mla_attention",
    "rms_norm",
    "rotary",
    "rotary_kv",
    "route_experts",
    "route_tokens",
    "write_kv",
    "write_latent",
)
HOPPER, TURING, CPU = Machine("cuda", (9, 0), "NVIDIA H200"), Machine("cuda", (7, 5), "T4"), Machine("cpu")


HAS_NUMBA = importlib.util.find_spec("numba") is not None


@pytest.fixture
def registry() -> KernelRegistry:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    return registry


def test_declares_the_ops(registry) -> None:
    assert registry.ops() == OPS and hooks.light_api == 1


@pytest.mark.parametrize("op", OPS)
def test_kernels_have_the_signature_of_the_reference(op, registry) -> None:
    kernels = registry.kernels(op)
    there = [kernel for kernel in kernels if HAS_NUMBA or not kernel.name.startswith("numba")]
    signatures = {kernel.name: str(inspect.signature(kernel.load({}))) for kernel in there}
    assert set(signatures.values()) == {signatures["reference"]}


@pytest.mark.parametrize("op", OPS)
def test_package_names_its_op(op) -> None:
    package = importlib.import_module(f"light_sdk.ops.{op}")
    assert package.__all__ == [op] and callable(getattr(package, op))


@pytest.mark.parametrize("op", OPS)
def test_selection(op, registry) -> None:
    of_op: dict[str, dict[str, object]] = {
        "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "alibi": False, "window": None},
        "attend_runs": {"head_dim": 80},
    }
    facts = of_op.get(op, {})
    chosen = {machine: OpTable(registry, machine, "bfloat16") for machine in (HOPPER, TURING, CPU)}
    names = {}
    for machine, table in chosen.items():
        table.select(op, **facts)
        names[machine] = table.choices[0].kernel
    with_libraries = dict.fromkeys(("linear", "attend_runs"), "triton+torch") | dict.fromkeys(
        ("attention", "mla_attention", "latent_attention"), "triton+cudnn"
    )
    assert names[HOPPER] == with_libraries.get(op, "triton")
    assert names[TURING] == "reference"
    assert names[CPU] == on_cpu(op)


def on_cpu(op: str) -> str:
    """The kernel that a CPU gets in bfloat16."""
    if op == "linear":
        packing, few_rows = hooks._accepts_packing_bfloat16({}), hooks._accepts_few_rows({})
        return "reference" if packing else "onednn-bf16" if few_rows or not HAS_NUMBA else "numba+onednn"
    if op in hooks.COMPILED_OPS and HAS_NUMBA:
        return "numba-cpu"
    return "torch-cpu" if op in hooks.CPU_OPS else "reference"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"head_dim": 512, "num_heads": 8, "num_kv_heads": 8}, "head_dim up to 256, not 512"),
        ({"num_heads": 9, "num_kv_heads": 2}, "9 over 2"),
    ],
)
def test_attention_refuses_what_its_kernel_cannot_do(facts, reason, registry) -> None:
    table = OpTable(registry, HOPPER, "bfloat16")
    table.select("attention", **facts)
    (choice,) = table.choices
    assert choice.kernel == "reference" and reason in choice.reason


def test_cudnn_has_tiles_for_most_heads_of_encoders(registry) -> None:
    table = OpTable(registry, HOPPER, "bfloat16")
    table.select("attend_runs", head_dim=64)
    (choice,) = table.choices
    assert choice.kernel == "reference" and "takes heads of 80, not 64" in choice.reason


@pytest.mark.parametrize("op", ["mla_attention", "latent_attention"])
def test_latents_whose_keys_cudnn_cannot_take(op, registry) -> None:
    (dense,) = (kernel for kernel in registry.kernels(op) if kernel.name == "triton+cudnn")
    facts = {"rank": 40, "key_dim": 24, "rotary_dim": 8}
    assert dense.accepts({**facts, "value_dim": 16}) is None
    assert "in eights, not 32 and 12" in dense.accepts({**facts, "value_dim": 12})


def test_hooks_import_nothing_heavy() -> None:
    program = "import sys, light_sdk.hooks; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_tuned_parameters_are_complete() -> None:
    folder = resources.files("light_sdk.ops.attention").joinpath("configs")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    sizes = {"64", "128", "256", "512", "1024"}
    assert set(files["default.json"]["decode"]) == set(files["default.json"]["prefill"]) == sizes
    for kinds in files.values():
        for kind, config in (("decode", DecodeConfig), ("prefill", PrefillConfig)):
            keys = set(kinds.get(kind, {}))
            few = {key for key in keys if kind == "decode" and re.fullmatch(r"\d+ to \d+", key)}
            assert keys - few <= sizes
            assert {key.partition(" to ")[0] for key in few} <= keys, "a key for few programs stands beside one for any number"
            for parameters in kinds.get(kind, {}).values():
                blocks = [value for name, value in vars_of(config(**parameters)) if name in ("block_m", "block_n", "num_warps")]
                assert all(value & (value - 1) == 0 for value in blocks)


def vars_of(config):
    return [(name, getattr(config, name)) for name in config.__dataclass_fields__]
