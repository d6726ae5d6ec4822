"""The command line as a whole: how quick it is, and how it ends."""

import subprocess
import sys
from typing import Any

import pytest

from light_core.cli.main import command, main
from light_core.errors import ConfigError, EngineDeadError

PROBE = """
import sys
sys.argv = ["light", *{arguments!r}]
from light_core.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", sorted({{"torch", "transformers", "fastapi", "zmq", "huggingface_hub"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["bench", "serve", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE.format(arguments=arguments)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_is_quick() -> None:
    """Processor time, the best of three, so that what else the machine does is left out."""
    took = []
    for _ in range(3):
        code = "import time; from light_core.cli import main\ntry: main(['--help'])\nfinally: open(1, 'w').write(str(time.process_time()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took.append(float(done.stdout.splitlines()[-1]))
    assert min(took) < 1.5


def ended(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> int:
    """The exit code of `light collect-env` if its body gives `outcome`, or raises it."""

    def body(**values: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(command.commands["collect-env"], "callback", body)
    with pytest.raises(SystemExit) as caught:
        main(["collect-env"])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(monkeypatch, None) == 0
    assert ended(monkeypatch, 2) == 2
    assert ended(monkeypatch, KeyboardInterrupt()) == 130
    assert ended(monkeypatch, EngineDeadError("it died")) == 1
    capsys.readouterr()
    assert ended(monkeypatch, ConfigError("it cannot be", "because", "do otherwise")) == 2
    assert capsys.readouterr() == ("", "error: it cannot be\ncause: because\ntry:   do otherwise\n")


def test_every_command_has_a_body() -> None:
    """Bodies are imported late; a name that is wrong would show only when somebody calls it."""
    from light_core.cli import bench, chat, collect_env, convert, doctor, generate, plugins, serve

    for module in (bench, chat, collect_env, convert, doctor, generate, plugins, serve):
        for name in module.__all__:
            assert callable(getattr(module, name))
