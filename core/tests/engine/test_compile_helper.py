"""The processes that compile for an engine. Real kernels are compiled by them in `tests/test_compile_ahead.py`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from light_core.config import EngineConfig
from light_core.engine import compile_helper
from light_core.engine.compile_helper import CompileHelper, current_helper, helping


@pytest.fixture
def helper() -> Iterator[CompileHelper]:
    helper = CompileHelper(2)
    yield helper
    helper.close()
    assert helper._process.wait(240) == 0


def closure(module: str, **constants: Any) -> Any:
    """As Triton's, of a kernel that is none: its module is imported by who compiles it."""
    function = SimpleNamespace(__module__=module, __qualname__="kernel")
    src = SimpleNamespace(fn=SimpleNamespace(fn=function), signature={}, constants=constants, attrs={})
    target, options, env_vars = SimpleNamespace(backend="cuda", arch=90, warp_size=32), SimpleNamespace(), {}
    return lambda: (src, target, options, env_vars)


def test_what_cannot_be_compiled_is_answered_and_costs_nothing_else(helper: CompileHelper) -> None:
    kernels = closure("json"), closure("no_such_module"), closure("json", x=1), closure("json", x="y" * 200_000), closure("json")
    assert [helper.ask(kernel).result(60) for kernel in kernels] == [False] * 5
    assert helper._process.poll() is None


def test_what_is_no_closure_of_tritons_or_no_data_is_answered_at_once(helper: CompileHelper) -> None:
    for strange in (lambda: None, len, closure("json", x=object())):
        answer = helper.ask(strange)
        assert answer.done() and answer.result() is False


def test_asking_never_waits(helper: CompileHelper) -> None:
    """What the socket does not hold is answered at once."""
    os.kill(helper._process.pid, signal.SIGSTOP)
    answers = [helper.ask(closure("json", x="y" * 10_000)) for _ in range(2000)]
    assert any(answer.done() for answer in answers)
    os.kill(helper._process.pid, signal.SIGCONT)
    assert not any(answer.result(60) for answer in answers)


def test_a_worker_that_crashes_ends_all_and_leaves_no_request_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashes.py").write_text("import os; os._exit(9)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    helper = CompileHelper(2)
    answers = [helper.ask(closure("crashes"))] + [helper.ask(closure("json")) for _ in range(3)]
    assert not any(answer.result(60) for answer in answers)
    assert helper._process.wait(240) == 0
    assert helper.ask(closure("json")).result(1) is False


@pytest.mark.parametrize("value", [None, True, 3, 0.1, float("inf"), "text", (), [], {}, {(1, 0): [["a", 16]], "b": ("c", (2, [None]))}])
def test_data_arrive_as_they_were(value: Any) -> None:
    restored = compile_helper._restored(json.loads(json.dumps(compile_helper._plain(value))))
    assert restored == value and type(restored) is type(value)


def test_closing_answers_what_was_asked_and_ends_all_processes() -> None:
    helper = CompileHelper(2)
    answer = helper.ask(closure("json"))
    helper.close()
    assert answer.result(1) is False
    assert helper._process.wait(240) == 0
    left = [name for name in os.listdir("/proc") if name.isdigit() and _session(name) == helper._process.pid]
    assert not left


def _session(pid: str) -> int:
    """Of a process that runs: where nobody asks how a process ended, its entry stays."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return 0 if fields[0] == "Z" else int(fields[3])
    except (OSError, IndexError):
        return 0


def test_an_engine_that_is_gone_takes_its_helper_along() -> None:
    code = "import os; from light_core.engine.compile_helper import CompileHelper as Helper"
    code += "; print(Helper(2)._process.pid, flush=True); os._exit(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid, until = int(done.stdout), time.monotonic() + 240
    while time.monotonic() < until and _session(str(pid)):
        time.sleep(0.05)
    assert not [name for name in os.listdir("/proc") if name.isdigit() and _session(name) == pid]


class Made:
    """In the place of a helper."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers, self.is_closed = num_workers, False

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("options", "cores", "has_gpu", "expected"),
    [
        ({}, 16, True, 16),
        ({"device": "cuda"}, 8, True, 8),
        ({"device": "cuda"}, 7, True, None),
        ({"device": "cpu"}, 16, True, None),
        ({"compile_ahead": False}, 16, True, None),
        ({}, 16, False, None),
    ],
)
def test_there_is_one_where_there_are_a_gpu_and_cores(
    options: dict[str, Any], cores: int, has_gpu: bool, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_helper, "CompileHelper", Made)
    monkeypatch.setattr(os.path, "exists", lambda path: has_gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    with helping(EngineConfig(model="any", **options)):
        helper: Any = current_helper()
        assert (helper.num_workers if helper is not None else None) == expected
        assert helper is None or not helper.is_closed
    assert current_helper() is None and (helper is None or helper.is_closed)


def test_it_ends_with_an_engine_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(8)
    monkeypatch.setattr(compile_helper, "_create", lambda config: made)
    with pytest.raises(KeyError), helping(EngineConfig(model="any")):
        raise KeyError
    assert made.is_closed and current_helper() is None
