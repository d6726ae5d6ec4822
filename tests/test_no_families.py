"""Core and SDK know no family: their code has no word of one, and where the SDK's comments do it is a paper's title."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted({path.name.split("_")[0] for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists()} - {"llama"})
"""Beginnings of the families' names. Llama is the one that examples name, and `light new-plugin` begins with."""
WORD = re.compile("|".join(NAMES), re.IGNORECASE)
PAPERS = re.compile(r"(arXiv|section) \d")


def test_the_names_are_those_of_the_plugins() -> None:
    assert {"mixtral", "deepseek", "qwen", "llava", "bloom"} <= set(NAMES)


@pytest.mark.parametrize("package", ["core", "sdk"])
def test_no_word_of_a_family(package: str) -> None:
    found = []
    for file in sorted((ROOT / package / "src").rglob("*.py")):
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            cites = package == "sdk" and PAPERS.search(" ".join(lines[max(0, number - 1) : number + 2]))
            if WORD.search(line) and not cites:
                found.append(f"{file.relative_to(ROOT)}:{number + 1}: {line.strip()}")
    assert not found
