"""Plugins installed for real: tiny distributions on `sys.path`, well-behaved and not."""

import importlib
import sys
import textwrap
from pathlib import Path

import pytest

HOOKS = """
from light_core.hookspecs import hookimpl
from light_core.types import ChatSpec, Family, KVGroup, KVLayout, KVPlane, WeightPlan

light_api = 1
MINE = {family!r}


@hookimpl
def light_register_families(registry):
    registry.add(Family(MINE, ({architecture!r},), bundled={{"demo-" + MINE: __package__ + "/demo"}}))


@hookimpl
def light_register_kernels(registry):
    registry.op("double_" + MINE, __package__ + ".model:double")


@hookimpl
def light_weight_plan(model):
    return WeightPlan(()) if model.family.name == MINE else None


@hookimpl
def light_kv_layout(model):
    if model.family.name == MINE:
        planes = (KVPlane("k", (2, 4), model.dtype), KVPlane("v", (2, 4), model.dtype))
        return KVLayout((KVGroup(tuple(range(model.config.num_hidden_layers)), planes),))


@hookimpl
def light_pre_layer(model):
    if model.family.name == MINE:
        return importlib.import_module(__package__ + ".model").Pre(model)


@hookimpl
def light_layer(model, layer_id):
    if model.family.name == MINE:
        return importlib.import_module(__package__ + ".model").Layer(model, layer_id)


@hookimpl
def light_post_layer(model):
    if model.family.name == MINE:
        return importlib.import_module(__package__ + ".model").Post(model)


@hookimpl
def light_chat(model):
    if model.family.name == MINE:
        return ChatSpec(template="chat of " + MINE)


import importlib
"""

MODEL = """
import torch


def double(x):
    return 2 * x


class Pre(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.double = model.ops.select("double_" + model.family.name, size=4)
        self.embedding = torch.nn.Parameter(torch.empty(16, 4))


class Layer(torch.nn.Module):
    def __init__(self, model, layer_id):
        super().__init__()
        self.layer_id = layer_id
        self.weight = torch.nn.Parameter(torch.empty(4, 4))


class Post(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.head = torch.nn.Parameter(torch.empty(16, 4))
"""


class Site:
    """A folder of installed distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = [str(folder)]

    def install(
        self,
        name: str,
        hooks: str | None = None,
        *,
        version: str = "1.0.0",
        entry: str | None = None,
        module: str | None = None,
        requires: tuple[str, ...] = ("light-core>=1.0,<2",),
        family: str | None = None,
        architecture: str | None = None,
        folder: Path | None = None,
    ) -> str:
        """Installs distribution `light-plugin-<name>` with package `lp_<name>`; returns the module of its hooks.

        Args:
            hooks: source of `hooks.py`; None is a family that behaves.
            entry: name of the entry point, `name` by default.
        """
        folder = folder or self.folder
        package = folder / f"lp_{name}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        if hooks is None:
            hooks = HOOKS.format(family=family or name, architecture=architecture or f"{name.title()}ForCausalLM")
            (package / "model.py").write_text(MODEL)
        (package / "hooks.py").write_text(textwrap.dedent(hooks))
        module = module or f"lp_{name}.hooks"
        info = folder / f"light_plugin_{name}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        lines = [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.1", f"Name: light-plugin-{name}", f"Version: {version}", *lines, "", ""])
        )
        (info / "entry_points.txt").write_text(f"[light.plugins]\n{entry or name} = {module}\n")
        (info / "RECORD").write_text(f"lp_{name}/__init__.py,,\nlp_{name}/hooks.py,,\n{info.name}/METADATA,,\n")
        importlib.invalidate_caches()
        return module


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of distributions, first on `sys.path`; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Site(folder)
    for name in set(sys.modules) - before:
        if name.startswith(("lp_", "light_plugin_file_")):
            del sys.modules[name]
    importlib.invalidate_caches()
