"""`core/benchmarks/scaling.py` runs, and fits curves rightly."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("scaling")
    for name in ("scaling", "streaming"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_exponent(scaling: Any, power: float) -> None:
    assert scaling.exponent([(size, 3.0 * size**power) for size in (1, 10, 100, 1000)]) == pytest.approx(power, abs=1e-9)


def test_line(scaling: Any) -> None:
    fixed, each = scaling.line([(size, 12.0 + 0.25 * size) for size in (1, 64, 4096)])
    assert (fixed, each) == (pytest.approx(12.0), pytest.approx(0.25))


def test_curves(
    scaling: Any, tmp_path: Path, look_at: Callable[[Path], tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    written, plot = tmp_path / "curves.json", tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--json", str(written), "--plot", str(plot)])
    assert scaling.main() == 0
    curves = json.loads(written.read_text())
    assert len(curves) == 9 and len({curve["title"] for curve in curves}) == 9
    assert all(cost > 0 for curve in curves for _, cost in curve["points"])
    assert capsys.readouterr().out.count("exponent") == 9
    look_at(plot)
