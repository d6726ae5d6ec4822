"""docs/models.md says of each variant what its tests prove now: nothing is missing, left over, or allowed otherwise."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from light_sdk.testing.bounds import bound_of
from light_sdk.testing.conformance import FamilyConformance
from light_sdk.testing.results import FAILED, announced_families, describe_check, planned_checks

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = sorted(manifest.parent for manifest in (ROOT / "plugins").glob("*/pyproject.toml"))


@cache
def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("light_models_" + "_".join(path.relative_to(ROOT).with_suffix("").parts), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_module(ROOT / "docs" / "models.py")
RESULTS = generator.load_results()
HOW = {
    name: f"run `{generator.RECORD} docs/models/{name} {asked}` and `{generator.COMMAND}`; without such a machine, "
    f"take the lines that are wrong out of docs/models/{name}"
    for name, asked in generator.FILES.items()
}


def find_suites(plugin: Path) -> dict[str, type[FamilyConformance]]:
    """The subclasses of `FamilyConformance` that pytest collects for `plugin`, by pytest's name of them."""
    suites = {}
    for path in sorted((plugin / "tests").rglob("test_*.py")):
        if "FamilyConformance" in path.read_text():
            for name, value in vars(load_module(path)).items():
                if name.startswith("Test") and isinstance(value, type) and issubclass(value, FamilyConformance):
                    suites[f"{path.relative_to(ROOT).as_posix()}::{name}"] = value
    return suites


@cache
def all_suites() -> dict[str, type[FamilyConformance]]:
    return {name: suite for plugin in PLUGINS for name, suite in find_suites(plugin).items()}


@cache
def planned(device: str) -> dict[tuple[str, str], dict[str, str | None]]:
    """(suite, variant) to the checks of it on `device`, and why it is exempt from them."""
    found = {}
    for name, suite in all_suites().items():
        checks = planned_checks(suite)
        there = {check: reason for check, reason in checks.items() if bound_of(getattr(suite, check)).device == device}
        found |= {(name, variant): there for variant in suite().configs()}
    return found


def recorded(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(variant["suite"], variant["variant"]): variant for variant in content["variants"]}


def disagreements(content: dict[str, Any], device: str) -> list[str]:
    """Where what a file records is not what the tests do now. What it lacks is not looked for."""
    found = []
    for name, check in content["checks"].items():
        now = getattr(FamilyConformance, name, None)
        if now is None or check != describe_check(now):
            found.append(f"{name} allows {check}, in the tests {describe_check(now) if now else 'there is none'}")
    for key, variant in recorded(content).items():
        now = planned(device).get(key)
        if now is None:
            found.append(f"{key} is none of the tests'")
            continue
        for check, outcome in variant["outcomes"].items():
            if check not in now:
                found.append(f"{key}: {check} is none of the checks on {device}")
            elif outcome == FAILED:
                found.append(f"{key}: {check} failed")
            elif isinstance(outcome, str) != (now[check] is not None) or (now[check] and outcome != f"exempt: {now[check]}"):
                found.append(f"{key}: {check} is recorded as {outcome}, in the tests the exemption is {now[check]}")
    return found


def missing(content: dict[str, Any], device: str) -> list[str]:
    """What the tests do on `device` and a file does not record."""
    there = recorded(content)
    return [
        f"{key}: {check}"
        for key, checks in planned(device).items()
        for check in checks
        if check not in there.get(key, {"outcomes": ()})["outcomes"]
    ]


def test_page_is_current() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == generator.models_page(RESULTS), f"out of date: run `{generator.COMMAND}`"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_every_plugin_has_variants(plugin: Path) -> None:
    suites = find_suites(plugin)
    variants = [key for key in planned("cpu") if key[0] in suites]
    assert variants, f"no test of {plugin.name} inherits FamilyConformance"
    page = (ROOT / "docs" / "models.md").read_text()
    assert all(f"\n| {variant} | `" in page for _, variant in variants)


def test_nothing_is_missing_on_the_cpu() -> None:
    assert missing(RESULTS["cpu.json"], "cpu") == [], HOW["cpu.json"]


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_recorded_is_what_tests_do(name: str) -> None:
    """A GPU's file may lack variants, and the page then says so; what it has must hold."""
    assert disagreements(RESULTS[name], "cpu" if name == "cpu.json" else "cuda") == [], HOW[name]


@pytest.mark.parametrize("name", RESULTS)
def test_architectures_are_those_that_plugins_announce(name: str) -> None:
    """And each variant's is one of its family."""
    content = RESULTS[name]
    announced = {modules[-1]: announced_families(modules) for modules in {tuple(variant["plugins"]) for variant in content["variants"]}}
    assert {module: announced[module] for module in content["families"]} == content["families"], HOW[name]
    assert name != "cpu.json" or content["families"].keys() == announced.keys(), HOW[name]
    for variant in content["variants"]:
        own = variant["plugins"][-1:]
        owners = own if variant["family"] in announced[own[0]] else variant["plugins"][:-1]
        assert any(variant["architecture"] in announced[module].get(variant["family"], ()) for module in owners)


@pytest.mark.parametrize("name", RESULTS)
def test_files_name_no_place_and_no_time(name: str) -> None:
    text = (ROOT / "docs" / "models" / name).read_text()
    assert re.findall(r"[\"\s]/\w|\b20\d\d\b", text) == []


# ----- the tests above can fail


def changed(**changes: Any) -> dict[str, Any]:
    """A copy of the CPU's results with one variant's record, or what one check allows, changed."""
    content = json.loads(json.dumps(RESULTS["cpu.json"]))
    content["variants"][0] |= changes.pop("variant", {})
    content["variants"][0]["outcomes"] |= changes.pop("outcomes", {})
    content["checks"]["test_padding"] |= changes
    return content


@pytest.mark.parametrize(
    "changes",
    [
        {"limit": 1.0},
        {"device": "cuda"},
        {"proves": "Nothing."},
        {"variant": {"variant": "one that is gone"}},
        {"outcomes": {"test_padding": FAILED}},
        {"outcomes": {"test_padding": "exempt: holds no KV"}},
        {"outcomes": {"test_float16_gpu": 0.0}},
    ],
    ids=str,
)
def test_a_change_of_the_tests_is_noticed(changes: dict[str, Any]) -> None:
    before = disagreements(changed(), "cpu")
    assert len(disagreements(changed(**changes), "cpu")) == len(before) + 1


def test_a_missing_variant_and_a_missing_check_are_noticed() -> None:
    content = changed()
    before = len(missing(content, "cpu"))
    del content["variants"][0]["outcomes"]["test_padding"]
    gone = content["variants"].pop(1)
    assert len(missing(content, "cpu")) - before == 1 + len(gone["outcomes"])


def test_failures_exemptions_and_what_was_not_run_are_shown() -> None:
    content = changed(outcomes={"test_padding": FAILED, "test_preemption": "exempt: holds no KV"})
    page = generator.models_page({"cpu.json": content})
    assert "**failed: padding**" in page and "exempt: preemption" in page and "Exempt from preemption: holds no KV." in page
    assert "14 checks" in page and "| not run yet |" in page


def test_what_a_gpu_found_stands_beside_it() -> None:
    """For one variant; the others are not run yet, and the page says so."""
    check = describe_check(FamilyConformance.test_cuda_graph)
    variant = RESULTS["cpu.json"]["variants"][0] | {"outcomes": {"test_cuda_graph": 2e-4}}
    content = RESULTS["cpu.json"] | {"machine": "A GPU", "checks": {"test_cuda_graph": check}, "variants": [variant]}
    assert disagreements(content, "cuda") == []
    assert len(disagreements(content, "cpu")) == 1, "a graph is none of the CPU's checks"
    page = generator.models_page({"cpu.json": RESULTS["cpu.json"], "h200.json": content})
    (row,) = [line for line in page.splitlines() if line.endswith("| 1 check<br>bfloat16 graph 2e-4 of 1e-3 |")]
    assert row.startswith(f"| {variant['variant']} | ")
    assert page.count("| not run yet |") == len(RESULTS["cpu.json"]["variants"]) - 1
    assert "| cuda_graph | A decode step" in page and f"| reference | {RESULTS['cpu.json']['machine']} | A GPU |" in page
