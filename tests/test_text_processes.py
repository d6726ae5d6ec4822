"""The processes that handle text alone: what they pay for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEXT_ALONE = """
import os, sys
from light_core.config import EngineConfig
from light_core.processes.defaults import _load_texts, load_model_tokenizer, resolve_plugins

config = EngineConfig(model="demo", model_plugin=sys.argv[1])
refs, _ = resolve_plugins(config)
load = {"http": lambda: _load_texts(config, refs)[0], "detokenizer": lambda: load_model_tokenizer(config, refs)}[sys.argv[2]]
tokenizer = load()
was_there = "torch" in sys.modules
assert tokenizer.decode(tokenizer.encode("What is love?")).endswith("What is love?")
import torch

assert torch.zeros(2).sum() == 0, "torch is as it should be for whoever imports it later"
assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
print(was_there)
"""


@pytest.mark.parametrize("process", ["http", "detokenizer"])
@pytest.mark.parametrize("imports_torch", [False, True])
def test_processes_of_text_import_torch_only_if_a_plugin_does(process: str, imports_torch: bool, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("import torch\n\nlight_api = 1\n" if imports_torch else "light_api = 1\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    command = [sys.executable, "-W", "ignore", "-c", TEXT_ALONE, f"llama,{plugin}", process]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == f"{imports_torch}\n", done.stderr
    assert [line for line in done.stderr.splitlines() if "imports torch when it is loaded" not in line] == []
