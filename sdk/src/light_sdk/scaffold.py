"""Starts a new plugin package as a renamed copy of an installed family, which serves and passes its tests from the start.

    light_sdk.scaffold.create("mine", "light-plugin-mine", like="llama")

The family's modules are copied from where they are installed, so that a new plugin begins with code that works today;
package metadata, README and tests are written afresh. The rest is the author's: change `config.py`, `model.py` and
`weights.py` until the conformance tests pass against the new model.
"""

import importlib.util
import keyword
import re
from importlib.metadata import entry_points
from pathlib import Path

from light_core.errors import ConfigError, PluginError

__all__ = ["create"]

MODULES = ("__init__", "hooks", "config", "model", "weights", "kv")

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "light-plugin-{name}"
version = "0.1.0"
description = "The {name} family for Light."
requires-python = ">=3.11"
dependencies = ["light-core>=1.0,<2", "light-sdk>=1.0,<2"]

[project.optional-dependencies]
test = ["light-sdk[testing]>=1.0,<2"]

[project.entry-points."light.plugins"]
{name} = "light_{name}.hooks"

[tool.hatch.build.targets.wheel]
packages = ["src/light_{name}"]

[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["gpu: needs one CUDA device"]
"""

README = """\
# light-plugin-{name}

The {name} family for Light: models whose config.json names the architecture `{architecture}`.

    pip install -e '.[test]'
    pytest -m "not gpu"
    light serve FOLDER --model-plugin {name}

It began as a copy of the {like} family. `hooks.py` answers Light's hooks, `config.py` reads sizes and switches,
`model.py` is the whole forward, `weights.py` maps the checkpoint's names to parameters, `kv.py` says what a token keeps.
"""

TESTS = '''\
"""The {name} family against transformers, by the standard checks."""

from typing import Any

from light_{name}.hooks import FAMILY
from light_sdk.testing import FamilyConformance
from transformers import AutoConfig

TINY = {{
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}}


class TestConformance(FamilyConformance):
    plugins = ("light_{name}.hooks",)

    def configs(self) -> dict[str, Any]:
        """The reference is transformers' {like} as long as the forward is; name the new model's `model_type` here."""
        return {{
            "base": AutoConfig.for_model("{like}", **TINY),
            "tied": AutoConfig.for_model("{like}", **TINY, tie_word_embeddings=True),
        }}

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The family goes by the architecture that it announces."""
        return config | {{"architectures": list(FAMILY.architectures)}}
'''


def create(name: str, folder: str | Path, like: str = "llama") -> Path:
    """Writes the package of a new family.

    Args:
        name: of the family; its package is `light_{name}`, its architecture the name in capitals and "ForCausalLM".
        folder: of the package; made, or empty.
        like: an installed family that it starts as a copy of.

    Returns:
        The folder.

    Raises:
        ConfigError: the name cannot be a package's, or the folder holds something.
        PluginError: `like` is not installed, or not laid out as families are.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name == like:
        raise ConfigError(
            f"{name!r} cannot name a family", "it takes lower-case letters, digits and _, and is not the copied one", "choose another"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is in the way", "a new package needs an empty folder or none", "name another folder")
    sources = _find(like)
    camel = "".join(part.capitalize() for part in name.split("_"))
    values = {"name": name, "like": like, "architecture": f"{camel}ForCausalLM"}
    package = folder / "src" / f"light_{name}"
    package.mkdir(parents=True)
    (folder / "tests").mkdir()
    for source in sources:
        (package / source.name).write_text(_renamed(source.read_text(encoding="utf-8"), camel, values), encoding="utf-8")
    (package / "__init__.py").write_text(f'"""The {name} family for Light."""\n', encoding="utf-8")
    for path, text in (("pyproject.toml", PYPROJECT), ("README.md", README), ("tests/test_conformance.py", TESTS)):
        (folder / path).write_text(text.format(**values), encoding="utf-8")
    return folder


def _find(like: str) -> list[Path]:
    """The modules of family `like`, without importing them."""
    spec = importlib.util.find_spec(f"light_{like}") if like.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        known = sorted(entry.name for entry in entry_points(group="light.plugins"))
        raise PluginError(
            f"family {like!r} is not installed", f"installed plugins: {', '.join(known) or 'none'}", f"pip install light-plugin-{like}"
        )
    package = Path(spec.submodule_search_locations[0])
    sources = [package / f"{module}.py" for module in MODULES]
    if missing := [source.name for source in sources if not source.is_file()]:
        raise PluginError(f"family {like!r} cannot be copied", f"{package} lacks {', '.join(missing)}", "choose another family")
    return sources


def _renamed(text: str, camel: str, values: dict[str, str]) -> str:
    """A module of the copied family under the new names, with an architecture of its own and no bundled models."""
    name, like = values["name"], values["like"]
    text = re.sub(rf"\blight_{like}\b", f"light_{name}", text)
    text = re.sub(rf"\b{like.capitalize()}Shape\b", f"{camel}Shape", text)
    text = text.replace(f"The {like} family", f"The {name} family").replace(f'name="{like}"', f'name="{name}"')
    text = re.sub(r"architectures=\([^)]*\)", f'architectures=("{values["architecture"]}",)', text)
    return re.sub(r"\n *bundled=[^\n]*", "", text)
