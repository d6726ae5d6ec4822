"""The results file says what ran, how it ended and what was allowed, in an order of its own."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from light_sdk.testing import results
from light_sdk.testing.conformance import FamilyConformance
from light_sdk.testing.results import assemble_results, describe_check, keep_bounds, planned_checks, render_results, round_up

SUITE = """
from transformers import LlamaConfig

from light_sdk.testing import FamilyConformance

TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}


class TestOurs(FamilyConformance):
    plugins = ("light_llama.hooks",)
    exempt = {"test_mixed_batch": "it is alone"}

    def configs(self):
        return {
            "sound": LlamaConfig(**TINY, num_attention_heads=4),
            "unsound": LlamaConfig(**TINY, num_attention_heads=2),
            "broken": LlamaConfig(**TINY, num_attention_heads=1),
        }

    def create_case(self, name, folder):
        if name == "broken":
            raise OSError("it cannot be made")
        case = super().create_case(name, folder)
        case.errors.append(9e-5)
        if name == "unsound":
            case.runtime.modules["post"].norm.weight.data.fill_(1.0)
        return case


def test_something_else():
    raise AssertionError("runs only without the option")
"""


CHOSEN = "weights_fit or prefill_logits or mixed or greedy or no_check"
"""A few of the checks; those of a GPU are not among them."""


def test_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "test_family.py").write_text(SUITE)
    options = [
        "-p",
        "light_sdk.testing.results",
        "--model-results",
        "found/cpu.json",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:asyncio",
        "--color=no",
    ]
    run = subprocess.run([sys.executable, "-m", "pytest", *options, "-k", CHOSEN], cwd=tmp_path, capture_output=True, text=True)
    assert re.search(r"2 failed, 4 passed, 3 skipped, \d+ deselected.* 3 errors", run.stdout), run.stdout + run.stderr
    assert "this was not all of the tests" in run.stdout
    found = json.loads((tmp_path / "found" / "cpu.json").read_text())
    assert list(found["checks"]) == ["test_weights_fit", "test_prefill_logits", "test_greedy_tokens", "test_mixed_batch"]
    assert found["checks"]["test_prefill_logits"] == describe_check(FamilyConformance.test_prefill_logits)
    assert "LlamaForCausalLM" in found["families"]["light_llama.hooks"]["llama"] and found["machine"].startswith("CPU (")
    broken, sound, unsound = found["variants"]
    error = sound["outcomes"]["test_prefill_logits"]
    assert 0 < error < 5e-5, "that of another check"
    exempt = {"test_mixed_batch": "exempt: it is alone"}
    assert sound == {
        "suite": "test_family.py::TestOurs",
        "plugins": ["light_llama.hooks"],
        "variant": "sound",
        "family": "llama",
        "architecture": "LlamaForCausalLM",
        "reference": "transformers LlamaForCausalLM",
        "outcomes": {"test_weights_fit": 0.0, "test_prefill_logits": error, "test_greedy_tokens": 0.0} | exempt,
    }
    failed = dict.fromkeys(("test_prefill_logits", "test_greedy_tokens"), "failed")
    assert unsound["variant"] == "unsound" and unsound["outcomes"] == {"test_weights_fit": 0.0} | failed | exempt
    assert broken["variant"] == "broken" and broken["outcomes"] == {"test_weights_fit": "failed"} | failed | exempt
    assert "architecture" not in broken


def test_the_file_does_not_depend_on_which_check_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does not with several processes. Plugins are loaded once, not for each order."""
    families = results.announced_families(["light_llama.hooks"])
    monkeypatch.setattr(results, "announced_families", lambda plugins: families)
    model = {"model": {"family": "llama", "architecture": "", "reference": ""}}
    found = [
        {
            "suite": "test.py::Test",
            "plugins": ["light_llama.hooks"],
            "variant": variant,
            "check": name,
            "allows": describe_check(check),
            "outcome": 0.0,
        }
        | (model if name != "test_weights_fit" else {})
        for variant in ("b", "a")
        for name, check in vars(FamilyConformance).items()
        if name in ("test_weights_fit", "test_prefill_logits", "test_padding")
    ]
    texts = {render_results(assemble_results(list(order))) for order in itertools.permutations(found)}
    assert len(texts) == 1
    variants = json.loads(texts.pop())["variants"]
    assert [variant["variant"] for variant in variants] == ["a", "b"] and all(variant["family"] == "llama" for variant in variants)


def test_every_check_of_a_variant_says_what_it_allows() -> None:
    """And none is left out of the plan."""

    class Excused(FamilyConformance):
        exempt = {"test_padding": "holds no KV"}  # noqa: RUF012

    planned = planned_checks(Excused)
    assert {"test_weights_fit", "test_prefill_logits", "test_bfloat16", "test_cuda_graph"} <= set(planned)
    assert "test_no_check_is_missing" not in planned
    assert {name for name, reason in planned.items() if reason} == {"test_padding"} and planned["test_padding"] == "holds no KV"
    descriptions = [describe_check(getattr(Excused, name)) for name in planned]
    assert all(one["proves"] and one["dtype"] and one["device"] in ("cpu", "cuda") and one["limit"] >= 0 for one in descriptions)


@pytest.mark.parametrize(
    ("error", "expected"), [(0.0, 0.0), (1e-5, 1e-5), (1.01e-5, 1.2e-5), (4e-5, 5e-5), (9e-5, 1e-4), (0.93, 1.0), (1.21, 1.25), (9.0, 1.25)]
)
def test_errors_are_rounded_up_and_stay_below_the_limit(error: float, expected: float) -> None:
    assert round_up(error, 1.25) == expected


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        (2e-5, 1.5e-5, 2e-5),  # holds and is close
        (2e-5, 3e-5, 3e-5),  # does not hold
        (5e-5, 1e-5, 1e-5),  # holds, and says too little
        (2e-4, 1e-4, 1e-4),  # is no longer allowed
        ("failed", 1e-5, 1e-5),
        (1e-5, "failed", "failed"),
    ],
)
def test_bounds_of_the_file_that_is_there(before: float | str, now: float | str, kept: float | str) -> None:
    checks = {"test_padding": describe_check(FamilyConformance.test_padding)}

    def results(outcome: float | str, *others: str) -> dict[str, Any]:
        return {"checks": checks, "variants": [{"suite": "s", "variant": v, "outcomes": {"test_padding": outcome}} for v in ("v", *others)]}

    first, second = keep_bounds(results(now, "new"), results(before))["variants"]
    assert first["outcomes"] == {"test_padding": kept} and second["outcomes"] == {"test_padding": now}
