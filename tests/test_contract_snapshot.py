"""Every public name and signature of `light_core`'s contract and of `light_sdk`, held against `contract.json`.

Plugins of other people are built on these. Whoever changes one takes a step in the package's version and regenerates
the file with `python tests/test_contract_snapshot.py`, which refuses if there was no step; `--unreleased` lets it
pass for a version that nobody has installed yet. Read from the source, so that neither the Python nor the torch that
runs this changes the result.
"""

import ast
import difflib
import json
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "contract.json"
COMMAND = "python tests/test_contract_snapshot.py"
CORE_MODULES = ("__init__", "types", "ops", "hookspecs", "errors", "config", "sampling_params", "llm")
IMPLEMENTATIONS = ("kernel", "cpu", "compiled")
"""Modules of an op that only the kernel registry reaches, by name; their signature is the reference's."""


# ------------------------------------------------------------------------------------------- the surface


def contract():
    """What contract.json should hold: version, plugin API and surface of each package."""
    core, sdk = ROOT / "core" / "src" / "light_core", ROOT / "sdk" / "src" / "light_sdk"
    sdk_files = [file for file in sorted(sdk.rglob("*.py")) if file.stem not in IMPLEMENTATIONS]
    return {
        "light_core": {
            "version": _version("core"),
            "api": _api(core),
            "surface": surface(core, [core / f"{name}.py" for name in CORE_MODULES]),
        },
        "light_sdk": {"version": _version("sdk"), "api": _api(core), "surface": surface(sdk, sdk_files)},
    }


def _version(package):
    return tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]["version"]


def _api(core):
    for node in ast.parse((core / "hookspecs.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "API_VERSION":
            return ast.literal_eval(node.value)
    raise AssertionError("hookspecs.py has no API_VERSION")


def surface(package, files):
    """Module to public name to signature. A module is public if it says `__all__`; specs of hooks always are."""
    modules = {}
    for file in files:
        parts = file.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if names := module_surface(ast.parse(file.read_text())):
            modules[name] = names
    return modules


def module_surface(tree):
    """Public name to signature, of one module."""
    definitions = dict(pair for node in tree.body for pair in _definitions(node))
    hooks = [name for name, text in definitions.items() if str(text).startswith("hookspec ")]
    public = [*ast.literal_eval(definitions["__all__"].partition(" = ")[2])] if "__all__" in definitions else []
    lazy = "__getattr__" in definitions
    missing = [name for name in public if name not in definitions]
    assert lazy or not missing, f"in __all__ and not defined: {missing}"
    return {name: definitions.get(name, "lazy") for name in sorted({*public, *hooks})}


def _definitions(node):
    """Name and signature of what a top-level statement defines."""
    if isinstance(node, ast.FunctionDef):
        yield node.name, _function(node)
    elif isinstance(node, ast.ClassDef):
        yield node.name, _class(node)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, f"from {'.' * node.level}{node.module or ''} import {alias.name}"
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name, f"import {alias.name}"
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield ast.unparse(target), ast.unparse(node)
    elif isinstance(node, ast.AnnAssign):
        yield ast.unparse(node.target), ast.unparse(node)
    elif isinstance(node, ast.If):  # imports for type checkers alone, and alternatives by platform
        for inner in (*node.body, *node.orelse):
            yield from _definitions(inner)


def _function(node):
    marks = [ast.unparse(decorator) for decorator in node.decorator_list]
    kind = next((mark for mark in ("property", "staticmethod", "classmethod", "hookspec") if mark in marks), "def")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kind} ({ast.unparse(node.args)}){returns}"


def _class(node):
    described = {"": " ".join([*(f"@{ast.unparse(mark)}" for mark in node.decorator_list), f"class ({', '.join(_bases(node))})"])}
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and (not member.name.startswith("_") or member.name in ("__init__", "__call__")):
            described[member.name] = _function(member)
        elif isinstance(member, (ast.AnnAssign, ast.Assign)):
            described |= {name: text for name, text in _definitions(member) if not name.startswith("_")}
    return described


def _bases(node):
    return [*map(ast.unparse, node.bases), *(f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords)]


# ------------------------------------------------------------------------------------------- judgement


def render(snapshot):
    return json.dumps(snapshot, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def differences(old, new):
    """A unified diff of two snapshots; "" if they are equal."""
    return "\n".join(
        difflib.unified_diff(render(old).splitlines(), render(new).splitlines(), "contract.json", "the code", lineterm="", n=2)
    )


def without_step(old, new):
    """Packages whose surface changed while their version stayed."""
    return [
        package
        for package in new
        if package in old and new[package]["surface"] != old[package]["surface"] and _step(new[package]) == _step(old[package])
    ]


def _step(package):
    return package["version"], package["api"]


def problem(old, new):
    """Why `new` may not stand beside the checked-in `old`, with the remedy; None if all is well."""
    if old == new:
        return None
    stuck = without_step(old, new)
    advice = (
        f"raise the version of {' and '.join(stuck)} in its pyproject.toml, then run" if stuck else "the version has changed too, so run"
    )
    return f"the contract has changed; {advice} `{COMMAND}`\n{differences(old, new)}"


# ------------------------------------------------------------------------------------------- tests


def test_contract_is_that_of_the_snapshot():
    message = problem(json.loads(SNAPSHOT.read_text()), contract())
    assert message is None, message


def test_snapshot_sees_the_whole_contract():
    snapshot = contract()
    core = snapshot["light_core"]["surface"]
    assert {"light_core", *(f"light_core.{name}" for name in CORE_MODULES[1:])} == set(core)
    assert core["light_core.hookspecs"]["light_layer"] == "hookspec (model: ModelContext, layer_id: int) -> Layer | None"
    assert core["light_core.types"]["Shard"]["rank"] == "rank: int = 0"
    assert core["light_core.ops"]["OpTable"]["select"] == "def (self, op: str, **facts: Any) -> Callable[..., Any]"
    assert core["light_core.types"]["Step"]["num_seqs"] == "property (self) -> int"
    assert "hookimpl" in snapshot["light_sdk"]["surface"]["light_sdk"]


BEFORE = {"package": {"version": "1.0.0", "api": 1, "surface": {"module": {"f": "def (x)"}}}}


@pytest.mark.parametrize(
    "names",
    [{"f": "def (x)", "g": "def ()"}, {}, {"f": "def (x, y)"}, {"f": "def (x=1)"}],
    ids=["added", "removed", "argument", "default"],
)
def test_a_change_needs_a_step(names):
    after = {"package": {**BEFORE["package"], "surface": {"module": names}}}
    message = problem(BEFORE, after)
    assert "raise the version of package" in message and COMMAND in message
    assert any(line.startswith(("+ ", "- ")) for line in message.splitlines())
    for step in ({"version": "1.1.0"}, {"api": 2}):
        assert without_step(BEFORE, {"package": {**after["package"], **step}}) == []
    assert problem(BEFORE, BEFORE) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(x): pass", "def f(x, y): pass"),
        ("def f(x: int): pass", "def f(x: str): pass"),
        ("class f:\n    a: int = 1", "class f:\n    a: int = 2"),
        ("class f:\n    def g(self): pass", "class f:\n    @property\n    def g(self): pass"),
        ("@dataclass\nclass f: pass", "@dataclass(frozen=True)\nclass f: pass"),
        ("class f(A): pass", "class f(B): pass"),
        ("f = 1", "f = 2"),
        ("from a import f", "from b import f"),
    ],
)
def test_what_counts_as_a_change(before, after):
    header = "__all__ = ['f']\n"
    assert module_surface(ast.parse(header + before)) != module_surface(ast.parse(header + after))
    docstring = "'''words'''\n" + header + before + "\ndef _private(): pass\ndef unlisted(): pass"
    assert module_surface(ast.parse(header + before)) == module_surface(ast.parse(docstring))


def test_a_name_in_all_must_exist():
    with pytest.raises(AssertionError, match="ghost"):
        module_surface(ast.parse("__all__ = ['ghost']"))


# ------------------------------------------------------------------------------------------- regeneration


def main(arguments):
    """Writes contract.json; returns the exit code."""
    new = contract()
    if SNAPSHOT.exists() and "--unreleased" not in arguments:
        old = json.loads(SNAPSHOT.read_text())
        if stuck := without_step(old, new):
            print(differences(old, new))
            print(f"refused: the surface of {' and '.join(stuck)} changed and its version did not")
            return 1
    SNAPSHOT.write_text(render(new))
    print(f"wrote {SNAPSHOT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
