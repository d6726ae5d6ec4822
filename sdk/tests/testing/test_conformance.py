"""The conformance kit is sharp: each fault put into a sound family fails the checks that are there to find it.

The family is llama's, so that faults are those that authors make. Each fault also leaves alone the checks that it cannot
concern; otherwise a kit that fails everything would pass here.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig

from light_core.types import Hidden, Step
from light_sdk.testing.conformance import Case, FamilyConformance, check_guard

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Suite(FamilyConformance):
    plugins = ("light_llama.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "base": LlamaConfig(**TINY),
            "dynamic": LlamaConfig(**TINY | {"max_position_embeddings": 32}, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
            "window": MistralConfig(**TINY, sliding_window=8),
        }


def failing(case: Case) -> set[str]:
    """Names of the logit checks, and of `test_weights_fit`, that `case` fails."""
    suite, failed = Suite(), set()
    for name in vars(FamilyConformance):
        check = getattr(suite, name)
        takes_case_alone = name.startswith("test_") and list(inspect.signature(check).parameters) == ["case"]
        if takes_case_alone and "bfloat16" not in name and "gpu" not in name and "graph" not in name and "float16" not in name:
            try:
                check(case)
            except AssertionError:
                failed.add(name.removeprefix("test_"))
    return failed


def change_step(module: Any, change: Callable[[Step], Step]) -> None:
    """Makes the rotary embedding see another step."""
    forward = module.forward

    def wrapped(step: Step) -> torch.Tensor:
        cos_sin: torch.Tensor = forward(changed := change(step))
        step.shared.update(changed.shared)
        return cos_sin

    module.forward = wrapped


def wrong_base(case: Case) -> None:
    case.runtime.modules["pre"].rotary.table.mul_(0.9)


def positions_from_the_chunk(case: Case) -> None:
    change_step(case.runtime.modules["pre"].rotary, lambda step: replace(step, positions=step.positions - step.positions.min()))


def length_so_far(case: Case) -> None:
    """Rotates a prompt token by how much of the prompt is there, not by the prompt's length."""
    change_step(case.runtime.modules["pre"].rotary, lambda step: replace(step, context_lens=step.positions + 1))


def length_of_the_chunk(case: Case) -> None:
    def change(step: Step) -> Step:
        counts = step.cu_seqlens_q.diff().long()
        return replace(step, context_lens=step.seq_lens.repeat_interleave(counts))

    change_step(case.runtime.modules["pre"].rotary, change)


def no_window(case: Case) -> None:
    for i in range(2):
        case.runtime.modules[f"layers.{i}"].attention.attention.window = None


def kv_not_written(case: Case) -> None:
    attention = case.runtime.modules["layers.1"].attention.attention
    attention._attention, rotary = partial(attention._attention), attention.rotary
    rotary._rotary_kv = lambda q, k, v, cos_sin, k_cache, v_cache, slots, interleaved: rotary._rotary(q, k, cos_sin, interleaved)


def contiguous_slots(case: Case) -> None:
    """Reads KV from the request's first slot on, as if slots were always in order."""
    attention = case.runtime.modules["layers.0"].attention.attention
    select = attention._attention

    def wrong(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, *rest: Any) -> None:
        table = (step.slot_table[:, :1] + torch.arange(step.slot_table.shape[1])).clamp(max=len(k) - 1)
        select(out, q, k, v, replace(step, slot_table=table.int()), *rest)

    attention._attention = wrong


def first_request_for_all(case: Case) -> None:
    """Every request of a step reads the slot-table row of the first."""
    attention = case.runtime.modules["layers.0"].attention.attention
    select = attention._attention

    def wrong(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, *rest: Any) -> None:
        select(out, q, k, v, replace(step, rows=step.rows[:1].repeat(step.num_seqs)), *rest)

    attention._attention = wrong


def residual_lost(case: Case) -> None:
    layer = case.runtime.modules["layers.0"]
    forward = layer.forward
    layer.forward = lambda hidden, step, kv: Hidden(forward(hidden, step, kv).x)


def norm_weight_lost(case: Case) -> None:
    """A norm that forgets its weight."""
    case.runtime.modules["post"].norm.weight.data.fill_(1.0)


ALL = {
    "prefill_logits",
    "decode_logits",
    "greedy_tokens",
    "chunked_prefill",
    "prefix_cache",
    "prefix_of_the_same_step",
    "mixed_batch",
    "padding",
    "preemption",
    "slot_order",
}

FAULTS: list[tuple[str, Callable[[Case], None], set[str], set[str]]] = [
    ("base", wrong_base, ALL, {"weights_fit"}),
    ("base", positions_from_the_chunk, {"decode_logits", "chunked_prefill", "prefix_cache", "mixed_batch"}, {"prefill_logits"}),
    ("base", kv_not_written, ALL, {"weights_fit"}),
    ("base", contiguous_slots, {"slot_order", "prefix_cache", "mixed_batch"}, {"prefill_logits", "decode_logits", "chunked_prefill"}),
    ("base", first_request_for_all, {"mixed_batch", "padding", "prefix_cache"}, {"prefill_logits", "decode_logits", "chunked_prefill"}),
    ("base", residual_lost, ALL, {"weights_fit"}),
    ("base", norm_weight_lost, ALL, {"weights_fit"}),
    ("dynamic", length_so_far, {"prefill_logits"}, {"weights_fit", "prefix_cache"}),
    ("dynamic", length_of_the_chunk, {"chunked_prefill", "mixed_batch", "preemption"}, {"prefill_logits", "decode_logits"}),
    ("window", no_window, ALL, {"weights_fit"}),
]


@pytest.mark.parametrize(("config", "fault", "caught", "untouched"), FAULTS, ids=[f"{row[0]}-{row[1].__name__}" for row in FAULTS])
def test_fault_is_caught(config: str, fault: Callable[[Case], None], caught: set[str], untouched: set[str], tmp_path: Path) -> None:
    case = Suite().create_case(config, tmp_path)
    assert failing(case) == set()
    fault(case)
    failed = failing(case)
    assert caught <= failed and not failed & untouched, f"failed: {sorted(failed)}"


@pytest.mark.parametrize("fault", ["unplanned", "missing", "twice", "short"])
def test_plan_faults_are_caught(fault: str, tmp_path: Path) -> None:
    case = Suite().create_case("base", tmp_path)
    plan = case.runtime.weight_plan
    *others, last = plan.placements
    changed = {
        "unplanned": others,
        "missing": [*plan.placements, replace(last, source="nowhere")],
        "twice": [*plan.placements, last],
        "short": [*others, replace(last, rows=3)],
    }[fault]
    broken = replace(case, runtime=replace(case.runtime, weight_plan=replace(plan, placements=tuple(changed))))
    assert failing(broken) == {"weights_fit"}


def test_bfloat16_check_catches_a_loss_of_precision(tmp_path: Path) -> None:
    """Weights rounded to three bits of mantissa are noisier than transformers in bfloat16."""
    suite, case = Suite(), Suite().create_case("base", tmp_path)
    suite.test_bfloat16(case)
    rounded = {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in case.source.state_dict().items()}
    save_file(rounded, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match="off by"):
        suite.test_bfloat16(case)


def test_overriding_a_check_is_refused() -> None:
    with pytest.raises(TypeError, match="test_decode_logits"):
        type("Weaker", (FamilyConformance,), {"test_decode_logits": lambda self, case: None})
    with pytest.raises(TypeError, match="test_padding"):
        type("Without", (FamilyConformance,), {"test_padding": None})


def test_removing_a_check_later_is_noticed() -> None:
    later = type("Later", (FamilyConformance,), {})
    later.test_padding = None  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="test_padding"):
        later().test_no_check_is_missing()


@pytest.mark.parametrize("exempt", [{"test_padding": " "}, {"test_nothing": "no such check"}, {"case": "not a check"}])
def test_exemptions_need_a_check_and_a_reason(exempt: dict[str, str]) -> None:
    with pytest.raises(TypeError, match=next(iter(exempt))):
        type("Excused", (FamilyConformance,), {"exempt": exempt})


def test_exemption_with_a_reason_is_accepted() -> None:
    class Excused(FamilyConformance):
        exempt: ClassVar[dict[str, str]] = {"test_padding": "holds no KV"}

    check_guard(Excused)
