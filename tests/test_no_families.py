"""Core and SDK know no family: there is no word of one in them, and papers are cited by their numbers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted({path.name.split("_")[0] for path in (ROOT / "plugins").iterdir() if (path / "pyproject.toml").exists()} - {"llama"})
"""Beginnings of the families' names. Llama is the one that examples name, and `light new-plugin` begins with."""
WORD = re.compile("|".join(NAMES), re.IGNORECASE)


def test_the_names_are_those_of_the_plugins() -> None:
    assert {"mixtral", "deepseek", "qwen", "llava", "bloom"} <= set(NAMES)


@pytest.mark.parametrize("package", ["core", "sdk"])
def test_no_word_of_a_family(package: str) -> None:
    found = []
    for file in sorted((ROOT / package / "src").rglob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if WORD.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found
