"""A generated package imports, registers, and passes the conformance checks that it comes with."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from light_core.errors import ConfigError, PluginError
from light_sdk.scaffold import create


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / "src"), *(path for path in sys.path if path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("like", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
def test_new_family_passes_its_own_tests(tmp_path: Path, like: str) -> None:
    folder = create("new_kind", tmp_path / "package", like)
    tests = folder / "tests" / "test_conformance.py"
    # An exempted check is skipped with its reason, and every other one runs.
    tests.write_text(tests.read_text().replace("    def configs", '    exempt = {"test_padding": "to see it skipped"}\n\n    def configs'))
    done = run(folder, "-m", "pytest", "-q", "-rs", "-m", "not gpu", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to see it skipped" in done.stdout and "2 skipped" in done.stdout and "32 passed" in done.stdout


def test_hooks_announce_the_new_family_alone(tmp_path: Path) -> None:
    folder = create("mine", tmp_path / "package")
    code = "import sys; from light_mine.hooks import FAMILY as f; print(f.name, *f.architectures, dict(f.bundled), 'torch' in sys.modules)"
    done = run(folder, "-c", code)
    assert done.stdout.strip() == "mine MineForCausalLM {} False", done.stderr
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "light-plugin-mine" and project["entry-points"]["light.plugins"] == {"mine": "light_mine.hooks"}
    left = [path for path in folder.rglob("*.py") if "light_llama" in path.read_text()]
    assert not left and {path.name for path in folder.iterdir()} == {"pyproject.toml", "README.md", "src", "tests"}


@pytest.mark.parametrize("name", ["", "Mine", "1st", "my-model", "class", "llama", "../up"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a family"):
        create(name, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        create("mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("like", ["nobody", "not a name", "core"])
def test_unknown_family_is_refused(tmp_path: Path, like: str) -> None:
    with pytest.raises(PluginError):
        create("mine", tmp_path / "package", like)
