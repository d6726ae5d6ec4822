"""Generated pages are those that the code gives now, and say all of it."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from light_core import hookspecs

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"light_docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_generator():
    return load_script("generate")


@pytest.mark.parametrize("name", load_generator().PAGES)
def test_page_is_current(name):
    generator = load_generator()
    assert (DOCS / name).read_text() == generator.PAGES[name](), f"docs/{name} is out of date: run `{generator.COMMAND}`"


def test_every_hook_is_documented_with_its_arguments():
    page = load_generator().hooks_page()
    hooks = [name for name in vars(hookspecs) if name.startswith("light_")]
    assert len(hooks) >= 9
    for name in hooks:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, f"{name} has no section"
        for argument in inspect.signature(getattr(hookspecs, name)).parameters:
            assert f"- `{argument}`: " in section, f"{name} does not explain {argument}"
        assert "```python\n@hookimpl" in section, f"{name} has no example"


def test_examples_are_python():
    page = load_generator().hooks_page()
    examples = [block.partition("```")[0] for block in page.split("```python\n")[1:] if block.startswith("@hookimpl")]
    assert len(examples) >= 9
    for example in examples:
        compile(example, "example", "exec")


def test_figures_have_what_the_tables_have(tmp_path):
    """Of performance.md: what is drawn is read from its tables, and adds up as they do."""
    plots = load_script("plots")
    text = plots.PAGE.read_text()
    found = plots.ratios(text)
    assert {model: sum(one[0] == model for one in found) for model in plots.RATIOS} == {
        "Llama-3.1-8B": 7,
        "DeepSeek-V2-Lite": 7,
        "Mixtral-8x7B": 4,
    }
    assert all(0.5 < ratio < 2.5 for *_, ratio in found)
    kinds, parts = plots.steps(text)
    totals = {row[0]: [float(cell) for cell in row[1:]] for row in plots.table_after(text, plots.STEPS) if row[0] in parts}
    for whole, by_part in parts.items():
        for kind, name in enumerate(kinds):
            total = sum(times[kind] for times in by_part.values())
            assert total == pytest.approx(totals[whole][kind], rel=0.01), f"{whole} of {name}"
    pytest.importorskip("matplotlib")
    plots.draw_ratios(found, tmp_path / "ratios.png")
    plots.draw_steps(kinds, parts, tmp_path / "steps.png")
    for name in ("ratios.png", "steps.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"](figures/{name})" in text and (plots.FIGURES / name).exists()
