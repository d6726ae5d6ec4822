"""Generated pages are those that the code gives now, and say all of it."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from light_core import hookspecs

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load_generator():
    spec = importlib.util.spec_from_file_location("light_docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
