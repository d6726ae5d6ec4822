"""`light plugin list`, `info` and `new`, as they print."""

import io
import sys
from types import ModuleType

import pytest
from rich.console import Console

from light_core.cli.plugins import list_plugins, new_plugin, plugin_info
from light_core.errors import PluginError


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def printed(console):
    return console.file.getvalue()


def test_list_shows_each_plugin_and_why_one_is_broken(site, console):
    site.install("alpha", version="1.2.3")
    site.install("broken", "light_api = 9", version="0.1.0")
    assert list_plugins(console=console) == 1
    lines = {line.split()[0]: line for line in printed(console).splitlines() if line.strip()}
    for part in ("light-plugin-alpha", "1.2.3", "alpha", "ok"):
        assert part in lines["alpha"]
    assert "light-core" in lines["core"] and "ok" in lines["core"]
    assert "light-plugin-broken" in printed(console) and "0.1.0" in printed(console) and "made for plugin API 9" in printed(console)
    assert lines["broken:"] == "broken: try: pip install -U light-core"


def test_list_without_faults_is_zero(site, console):
    site.install("alpha")
    assert list_plugins(console=console) == 0
    assert "broken" not in printed(console)


def test_list_takes_text_in_brackets_as_text(site, console):
    site.install("alpha", "light_api = 1\nraise ValueError('[bold]x[/nothing]')")
    list_plugins(console=console)
    assert "[bold]x[/nothing]" in printed(console)


def test_info_of_a_plugin(site, console):
    site.install("alpha", version="1.2.3")
    assert plugin_info("alpha", console=console) == 0
    text = printed(console)
    for part in (
        "light-plugin-alpha",
        "1.2.3",
        "lp_alpha.hooks",
        "AlphaForCausalLM",
        "light_kv_layout",
        "double_alpha",
        "demo-alpha",
        "light-core",
    ):
        assert part in text
    assert "light_media_encoders" not in text


def test_info_names_kernels_for_ops_of_others(site, console):
    body = "from light_core.ops import Kernel\n@hookimpl\ndef light_register_kernels(registry):\n"
    site.install(
        "alpha", f"from light_core.hookspecs import hookimpl\nlight_api = 1\n{body}    registry.kernel(Kernel('gather', 'fast', 'x:y'))\n"
    )
    assert plugin_info("alpha", console=console) == 0
    assert "gather/fast" in printed(console)


def test_info_of_a_broken_plugin(site, console):
    site.install("alpha", "light_api = 9")
    assert plugin_info("alpha", console=console) == 1
    assert "cause: it is made for plugin API 9" in printed(console)


def test_info_of_no_plugin(site, console):
    site.install("alpha")
    assert plugin_info("alpa", console=console) == 2
    assert "'alpa' is not installed" in printed(console) and "light plugin info alpha" in printed(console)


def test_new_calls_the_scaffold(monkeypatch, tmp_path, console):
    calls = []
    scaffold = ModuleType("light_sdk.scaffold")
    scaffold.create = lambda name, folder, like: calls.append((name, folder, like)) or folder / name
    monkeypatch.setitem(sys.modules, "light_sdk.scaffold", scaffold)
    assert new_plugin("mine", folder=str(tmp_path), like="llama", console=console) == 0
    assert calls == [("mine", tmp_path, "llama")] and str(tmp_path / "mine") in printed(console).replace("\n", "")


def test_new_without_the_sdk(monkeypatch):
    monkeypatch.setitem(sys.modules, "light_sdk.scaffold", None)
    with pytest.raises(PluginError) as caught:
        new_plugin("mine")
    assert caught.value.remedy == "pip install light-sdk"
