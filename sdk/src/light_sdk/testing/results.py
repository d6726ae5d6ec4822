"""Writes down what the standard checks found: `pytest -p light_sdk.testing.results --model-results FILE`, a pytest plugin.

With the option the checks of `FamilyConformance` run and no other tests; those that fail are written down as failed. FILE
is JSON and holds one run: the kind of processor and the versions, what each check allows, the families of each plugin,
and a line for each variant. It has no times and no paths outside of the project. Errors are bounds: rounded up, and those
of the file that is there are kept where they hold and are close, as other processors of the kind and other versions move
last digits. Running again gives the same file. Works with pytest-xdist.
"""

import json
import math
import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from light_sdk.testing.bounds import bound_of

__all__ = [
    "FAILED",
    "announced_families",
    "assemble_results",
    "describe_check",
    "keep_bounds",
    "planned_checks",
    "render_results",
    "round_up",
]

FAILED = "failed"
PROPERTY = "light_model_result"
STEPS = (1, 1.2, 1.5, 2, 3, 5, 7, 10)
"""What errors are rounded up to, times a power of ten."""
CLOSE = 2.0
"""Up to so many times an error that was rounded up, an earlier bound is kept."""
LIBRARIES = ("torch", "transformers", "triton")


def planned_checks(suite: type[Any]) -> dict[str, str | None]:
    """Every check of the subclass `suite` of `FamilyConformance` that runs for each variant: name to None, or to the reason
    why the suite is exempt from it."""
    from light_sdk.testing.conformance import FamilyConformance

    checks = [name for name, check in vars(FamilyConformance).items() if name.startswith("test_") and _takes_case(check)]
    return {name: suite.exempt.get(name) for name in checks}


def announced_families(plugins: Sequence[str]) -> dict[str, list[str]]:
    """The families that the last of `plugins`, module paths, announces: name to architectures."""
    from light_core.plugins import load_plugins

    families = load_plugins(",".join(plugins)).families
    return {family.name: list(family.architectures) for family in families if families.owner(family).ref.module == plugins[-1]}


def describe_check(check: Callable[..., Any]) -> dict[str, Any]:
    """What a check proves, and the fields of its `Bound`."""
    return {"proves": (check.__doc__ or "").partition("\n")[0], **asdict(bound_of(check))}


def round_up(error: float, limit: float) -> float:
    """`error` rounded up to a step of `STEPS`, and `limit` where that is more: a bound that holds and is allowed."""
    if error <= 0.0:
        return 0.0
    exponent = math.floor(math.log10(error))
    steps = (float(f"{step}e{exponent}") for step in STEPS)
    return min(next((step for step in steps if error <= step), limit), limit)


def keep_bounds(results: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`results`, overwritten with the bounds of `before` that hold for them and are close."""
    earlier = {(variant["suite"], variant["variant"]): variant["outcomes"] for variant in before["variants"]}
    for variant in results["variants"]:
        there = earlier.get((variant["suite"], variant["variant"]), {})
        for name, error in variant["outcomes"].items():
            bound = there.get(name)
            is_number = isinstance(bound, float) and isinstance(error, float)
            if is_number and error <= bound <= min(CLOSE * error, results["checks"][name]["limit"]):
                variant["outcomes"][name] = bound
    return results


def render_results(results: dict[str, Any]) -> str:
    """`results` as JSON with a line for each variant, each check and each plugin."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        elif isinstance(value, dict):
            text = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()) + "\n }"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# ----- pytest's hooks


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "run the checks of FamilyConformance alone and write what they found to FILE"
    parser.getgroup("light").addoption("--model-results", metavar="FILE", type=Path, help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--model-results"):
        config.pluginmanager.register(ModelResults(config.invocation_params.dir / path), "light-model-results")


class ModelResults:
    """Gathers the outcome of each check and writes the file at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[dict[str, Any]] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        others = [item for item in items if not _is_check(item)]
        items[:] = [item for item in items if _is_check(item)]
        config.hook.pytest_deselected(items=others)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> None:
        """The case is that of the check before, and so far has its errors."""
        item.funcargs["case"].errors.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """In the process that ran the check; xdist sends the report's properties to the one that writes."""
        report = yield
        if report.when == "call" or (report.when == "setup" and not report.passed):
            report.user_properties.append((PROPERTY, json.dumps(describe_outcome(item, report))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            self._found += [json.loads(str(value)) for name, value in report.user_properties if name == PROPERTY]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        is_worker = hasattr(session.config, "workerinput")
        finished = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if self._found and finished and not is_worker:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            results = assemble_results(self._found)
            if self._path.exists():
                results = keep_bounds(results, json.loads(self._path.read_text()))
            self._path.write_text(render_results(results))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line("with --model-results only the checks of model families run: this was not all of the tests")


# ----- records


def describe_outcome(item: Any, report: pytest.TestReport) -> dict[str, Any]:
    """One check of one variant as it ended; what needs the variant's checkpoint is left out where it could not be made."""
    check = getattr(item.cls, item.originalname)
    case, bound = item.funcargs.get("case"), bound_of(check)
    outcome: float | str = FAILED
    if report.passed:
        outcome = round_up(max(case.errors, default=0.0), bound.limit)
    elif report.skipped:
        outcome = f"exempt: {item.cls.exempt[item.originalname]}"
    found = {
        "suite": item.nodeid.rpartition("::")[0],
        "plugins": list(item.cls.plugins),
        "variant": item.callspec.params["case"],
        "check": item.originalname,
        "allows": describe_check(check),
        "outcome": outcome,
    }
    if case is not None:
        found["model"] = {
            "family": case.runtime.model.checkpoint_family.name,
            "architecture": json.loads((case.folder / "config.json").read_text())["architectures"][0],
            "reference": describe_reference(case.source),
        }
    return found


def describe_reference(source: Any) -> str:
    """Where the reference model comes from: "transformers NAME", or its class in the test and what it computes in."""
    kind = type(source)
    if kind.__module__.startswith("transformers."):
        return f"transformers {kind.__name__}"
    return f"{kind.__name__} in the test, {str(next(source.parameters()).dtype).removeprefix('torch.')}"


def assemble_results(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the file, in an order that does not depend on which check ended first."""
    checks = {record["check"]: record["allows"] for record in found}
    plugins = {record["plugins"][-1]: record["plugins"] for record in found}
    variants: dict[tuple[str, str], dict[str, Any]] = {}
    outcomes: dict[tuple[str, str], dict[str, float | str]] = {}
    for record in sorted(found, key=lambda record: "model" not in record):
        key = record["suite"], record["variant"]
        fields = {name: record[name] for name in ("suite", "plugins", "variant")} | record.get("model", {})
        variants.setdefault(key, fields)
        outcomes.setdefault(key, {})[record["check"]] = record["outcome"]
    order = list(_standard_checks())
    return {
        "machine": _machine({allows["device"] for allows in checks.values()}),
        "versions": {name: _version(name) for name in LIBRARIES},
        "checks": {name: checks[name] for name in order if name in checks},
        "families": {name: announced_families(plugins[name]) for name in sorted(plugins)},
        "variants": [
            {**variants[key], "outcomes": {name: outcomes[key][name] for name in order if name in outcomes[key]}}
            for key in sorted(variants)
        ],
    }


def _machine(devices: set[str]) -> str:
    """The kind of processor that computed, not which one."""
    import torch

    return torch.cuda.get_device_name() if "cuda" in devices and torch.cuda.is_available() else f"CPU ({platform.machine()})"


def _version(library: str) -> str:
    """Without the part that names a build."""
    return version(library).partition("+")[0]


def _standard_checks() -> Iterator[str]:
    from light_sdk.testing.conformance import FamilyConformance

    return (name for name in vars(FamilyConformance) if name.startswith("test_"))


def _takes_case(check: Any) -> bool:
    return "case" in check.__code__.co_varnames[: check.__code__.co_argcount]


def _is_check(item: Any) -> bool:
    from light_sdk.testing.conformance import FamilyConformance

    cls = getattr(item, "cls", None)
    standard = cls is not None and issubclass(cls, FamilyConformance) and hasattr(FamilyConformance, item.originalname)
    return standard and "case" in item.fixturenames
