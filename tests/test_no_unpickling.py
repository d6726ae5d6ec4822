"""Nothing that ships can be made to run code by data: no unpickling, no evaluation, no such thing under another name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("core/src", "sdk/src", "plugins") for path in (ROOT / folder).rglob("*.py") if "tests" not in path.parts
)

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "rpyc", "pickletools", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "recv_pyobj", "send_pyobj", "allow_pickle", "loads_pickle"}
ALLOWED = {"re.compile", "torch.compile", "model.eval", "triton.compile"}
"""Attribute calls that share a name with what is forbidden and are something else."""
EXCEPTIONS: dict[str, str] = {}
"""File to the reason why it may."""


def findings(tree: ast.AST) -> list[str]:
    """Every use of what is forbidden, as "line: what"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(f"{node.lineno}: from {node.module} import")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if (name in CALLS) or (last in CALLS - {"compile", "eval"} and name not in ALLOWED):
                found.append(f"{node.lineno}: {name}(…)")
            if last == "import_module" and any(isinstance(arg, ast.Constant) and arg.value in MODULES for arg in node.args):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            for keyword in node.keywords:
                value = keyword.value
                on = not (isinstance(value, ast.Constant) and value.value is False)
                if (keyword.arg in ("allow_pickle", "trust_remote_code") and on) or (keyword.arg == "weights_only" and not on):
                    found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(value)}")
            if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                found.append(f"{node.lineno}: torch.load without weights_only")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_data(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = findings(ast.parse(path.read_text()))
    assert bool(found) == (name in EXCEPTIONS), found or f"{name} needs no exception any more"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.package, dill",
        "socket.recv_pyobj()",
        "eval(text)",
        "importlib.import_module('pickle')",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert findings(ast.parse(code))


def test_the_search_lets_pass() -> None:
    code = "re.compile('x'); model.eval(); torch.compile(f); msgspec.msgpack.decode(data); f(trust_remote_code=False)"
    assert not findings(ast.parse(code))
    assert len(SOURCES) > 30
