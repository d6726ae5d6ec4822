"""Plugins are loaded whole or refused with a reason that names them."""

import os
import subprocess
import sys

import msgspec
import pytest

from light_core.errors import ModelError, PluginError
from light_core.plugins import PluginRef, count_hook_calls, inspect_plugins, load, load_plugins, resolve_family
from light_core.plugins.loading import create_kernel_registry

HEADER = "from light_core.hookspecs import hookimpl\nfrom light_core.types import Family\nlight_api = 1\n"


def refused(site, names=None):
    with pytest.raises(PluginError) as caught:
        load_plugins(names, path=site.path)
    return caught.value


def test_loads_named_plugins_only(site):
    site.install("alpha")
    site.install("beta")
    loaded = load_plugins("beta", path=site.path)
    assert [info.ref.name for info in loaded.plugins] == ["core", "beta"]
    assert [family.name for family in loaded.families] == ["beta"]
    assert "lp_alpha.hooks" not in sys.modules


def test_import_error_of_a_named_plugin(site):
    site.install("alpha", HEADER + "import no_such_module_anywhere\n", version="2.0.1")
    error = refused(site, "alpha")
    assert "light-plugin-alpha 2.0.1 (alpha)" in error.error
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in error.cause
    assert "pip install -U light-plugin-alpha" in error.remedy and "'no_such_module_anywhere'" in error.remedy


@pytest.mark.parametrize("statement", ["raise SystemExit(3)", "1 / 0", "from light_core.types import NoSuchName"])
def test_whatever_an_import_raises_is_contained(site, statement):
    site.install("alpha", HEADER + statement)
    assert "light-plugin-alpha 1.0.0" in refused(site, "alpha").error
    assert [info.ref.name for info in load_plugins(path=site.path).broken] == ["alpha"]


def test_broken_requirement_of_a_named_plugin(site):
    site.install("alpha", requires=("light-plugin-beta",))
    site.install("beta", "light_api = 7")
    assert "light-plugin-beta 1.0.0" in refused(site, "alpha").error


def test_discovered_broken_plugin_is_skipped_and_its_reason_repeated(site, caplog):
    site.install("alpha", HEADER + "raise ValueError('out of order')")
    site.install("beta", "light_api = 9")
    site.install("llama", architecture="LlamaForCausalLM")
    loaded = load_plugins(path=site.path)
    assert [info.ref.name for info in loaded.broken] == ["alpha", "beta"]
    assert "out of order" in caplog.text
    with pytest.raises(ModelError) as caught:
        resolve_family(["LlamoForCausalLM"], loaded)
    error = caught.value
    assert "LlamoForCausalLM" in error.error
    for part in (
        "light-plugin-llama 1.0.0",
        "LlamaForCausalLM",
        "light-plugin-alpha 1.0.0 (alpha) was not loaded",
        "out of order",
        "plugin API 9",
    ):
        assert part in error.cause
    assert "pip install -U light-plugin-alpha" in error.remedy and "pip install -U light-core" in error.remedy


def test_broken_plugins_keep_no_frames_alive(site):
    site.install("alpha", HEADER + "1 / 0")
    (info,) = load_plugins(path=site.path).broken
    assert info.error.__traceback__ is None and info.error.__cause__ is None and info.error.__context__ is None


@pytest.mark.parametrize("names", [None, "alpha,beta"])
@pytest.mark.parametrize(
    ("family", "architecture", "what"), [("alpha", "BetaModel", "family 'alpha'"), ("beta", "AlphaModel", "architecture 'AlphaModel'")]
)
def test_duplicate_families_name_both(site, names, family, architecture, what):
    site.install("alpha", architecture="AlphaModel", version="1.1.0")
    site.install("beta", family=family, architecture=architecture, version="1.2.0")
    error = refused(site, names)
    assert f"{what} is announced twice" in error.error
    assert "light-plugin-alpha 1.1.0" in error.cause and "light-plugin-beta 1.2.0" in error.cause
    assert "uninstall light-plugin-alpha or light-plugin-beta" in error.remedy


def test_duplicate_within_one_plugin(site):
    body = (
        "@hookimpl\ndef light_register_families(registry):\n    registry.add(Family('a', ('X',)))\n    registry.add(Family('b', ('X',)))\n"
    )
    site.install("alpha", HEADER + body)
    assert "install another version of light-plugin-alpha" in refused(site).remedy


@pytest.mark.parametrize("names", [None, "alpha"])
@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("@hookimpl\ndef light_kv_layuot(model):\n    pass", "no hook 'light_kv_layuot'; did it mean 'light_kv_layout'"),
        ("@hookimpl\ndef light_layer(model, layer):\n    pass", "light_layer has no argument 'layer'; it has model, layer_id"),
        ("@hookimpl\ndef light_layer(model, layer_id=0):\n    pass", "`layer_id=0` of light_layer would never be filled"),
        ("@hookimpl\ndef light_layer(model, *, layer_id):\n    pass", "`layer_id` of light_layer would never be filled"),
        ("@hookimpl\ndef light_chat(**everything):\n    pass", "`**everything` of light_chat would never be filled"),
        ("def light_chat(model):\n    pass", "light_chat is a hook's name, but the function is not marked @hookimpl"),
        ("@hookimpl(wrapper=True)\ndef light_chat(model):\n    return []", "not a generator"),
        ("@hookimpl(specname='light_nothing')\ndef chat(model):\n    pass", "no hook 'light_nothing'"),
    ],
)
def test_hooks_that_do_not_fit_are_errors(site, names, body, cause):
    site.install("alpha", HEADER + body + "\n", version="4.5.6")
    error = refused(site, names)
    assert "light-plugin-alpha 4.5.6 (alpha) does not fit the hooks" in error.error
    assert cause in error.cause
    assert "hooks.py" in error.remedy and "pip uninstall light-plugin-alpha" in error.remedy


def test_hooks_may_take_fewer_arguments_and_be_optional(site):
    body = "@hookimpl\ndef light_layer(model):\n    pass\n@hookimpl(optionalhook=True)\ndef light_of_tomorrow(model):\n    pass\n"
    site.install("alpha", HEADER + body)
    assert "light_layer" in load_plugins("alpha", path=site.path).hooks_of(load_plugins("alpha", path=site.path).info("alpha"))


def test_failure_while_registering(site):
    site.install("alpha", HEADER + "@hookimpl\ndef light_register_families(registry):\n    registry.add('llama')\n")
    site.install("beta", HEADER + "@hookimpl\ndef light_register_families(registry):\n    registry.remove('llama')\n")
    assert "announces a str, not a Family" in refused(site, "alpha").cause
    assert "light-plugin-beta 1.0.0 (beta) failed in light_register_families" in refused(site, "beta").error
    assert [info.ref.name for info in load_plugins(path=site.path).broken] == ["alpha", "beta"]


def test_ops_declared_twice_name_the_plugin(site):
    body = "@hookimpl\ndef light_register_kernels(registry):\n    registry.op('gather_twice', 'torch:gather')\n"
    site.install("alpha", HEADER + body)
    site.install("beta", HEADER + body)
    with pytest.raises(PluginError, match=r"light-plugin-beta 1\.0\.0 \(beta\): op 'gather_twice' is declared twice"):
        create_kernel_registry(load_plugins(path=site.path))


def test_file_plugin(site, tmp_path):
    file = tmp_path / "elsewhere" / "hooks.py"
    file.parent.mkdir()
    file.write_text(HEADER + "@hookimpl\ndef light_register_families(registry):\n    registry.add(Family('filed', ('FiledModel',)))\n")
    loaded = load_plugins(str(file), path=site.path)
    assert resolve_family(["FiledModel"], loaded).name == "filed"
    ref = loaded.refs[-1]
    assert ref.file == str(file) and ref.version.startswith("sha256:") and ref.module in sys.modules
    assert load(loaded.refs).refs == loaded.refs
    file.write_text(file.read_text() + "\n")
    with pytest.raises(PluginError, match="has changed while Light was starting"):
        load(loaded.refs)


@pytest.mark.parametrize(("line", "cause"), [("", "does not say light_api"), ("light_api = 2", "made for plugin API 2")])
def test_file_and_module_plugins_are_checked_too(site, line, cause):
    (site.folder / "lp_unversioned").mkdir()
    file = site.folder / "lp_unversioned" / "hooks.py"
    file.write_text(line + "\nraise RuntimeError('imported')\n")
    for name in (str(file), "lp_unversioned.hooks"):
        error = refused(site, name)
        assert cause in error.cause and "lp_unversioned" in error.error and error.remedy


def test_file_plugin_that_fails_leaves_no_module(site, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("light_api = 1\nraise KeyError('x')\n")
    before = set(sys.modules)
    assert "KeyError" in refused(site, str(file)).cause
    assert not [name for name in set(sys.modules) - before if name.startswith("light_plugin_file_")]


def test_module_plugin(site):
    (site.folder / "lp_loose.py").write_text(HEADER)
    (site.folder / "lp_dotted").mkdir()
    (site.folder / "lp_dotted" / "hooks.py").write_text(HEADER)
    loaded = load_plugins("lp_dotted.hooks", path=site.path)
    assert loaded.refs[-1].version.startswith("sha256:") and str(loaded.plugins[-1]).startswith("lp_dotted.hooks sha256:")
    assert load(loaded.refs).refs == loaded.refs


def test_refs_cross_processes(site):
    site.install("alpha")
    site.install("beta", "light_api = 9")
    loaded = load_plugins(path=site.path)
    wire = msgspec.msgpack.encode(loaded.refs)
    refs = msgspec.msgpack.decode(wire, type=tuple[PluginRef, ...])
    again = load(refs)
    assert again.refs == loaded.refs
    assert [family.name for family in again.families] == ["alpha"]
    with pytest.raises(ModelError) as caught:
        resolve_family(["NoSuchModel"], again)
    assert "light-plugin-beta 1.0.0 (beta) was not loaded: it is made for plugin API 9" in caught.value.cause
    assert "pip install -U light-core" in caught.value.remedy


def test_another_version_in_the_other_process(site):
    site.install("alpha")
    loaded = load_plugins("alpha", path=site.path)
    (site.folder / "light_plugin_alpha-1.0.0.dist-info").rename(site.folder / "light_plugin_alpha-1.0.1.dist-info")
    site.install("alpha", version="1.0.1")
    with pytest.raises(PluginError) as caught:
        load(loaded.refs)
    assert "light-plugin-alpha 1.0.0 (alpha)" in caught.value.error
    assert "1.0.0 was chosen" in caught.value.cause and "1.0.1" in caught.value.cause


def test_removed_in_the_other_process(site):
    gone = PluginRef("alpha", "lp_alpha.hooks", "1.0.0", "light-plugin-alpha")
    with pytest.raises(PluginError, match="it is gone"):
        load((gone,))


def test_inspection_survives_everything(site):
    site.install("fine")
    site.install("twin", entry="same")
    site.install("twain", entry="same")
    site.install("typo", HEADER + "@hookimpl\ndef light_layr(model):\n    pass\n")
    site.install("thief", architecture="FineForCausalLM")
    loaded = inspect_plugins(site.path)
    assert [info.ref.name for info in loaded.plugins] == ["core", "fine"]
    reasons = {str(info): info.error.cause for info in loaded.broken}
    assert len(reasons) == 4
    assert "light-plugin-fine 1.0.0" in reasons["light-plugin-thief 1.0.0 (thief)"]
    assert "light_layer" in reasons["light-plugin-typo 1.0.0 (typo)"]
    loaded.manager.check_pending()


def test_heavy_imports_are_told(site, caplog):
    script = HEADER + "import sys, types\nsys.modules.setdefault('transformers', types.ModuleType('transformers'))\n"
    had = sys.modules.pop("transformers", None)
    try:
        site.install("alpha", script)
        load_plugins("alpha", path=site.path)
    finally:
        sys.modules.pop("transformers", None)
        if had is not None:
            sys.modules["transformers"] = had
    assert "light-plugin-alpha 1.0.0 (alpha) imports transformers" in caplog.text


def test_hook_calls_are_counted(site):
    site.install("alpha")
    loaded = load_plugins("alpha", path=site.path)
    with count_hook_calls(loaded) as calls:
        create_kernel_registry(loaded)
    assert calls == {"light_register_kernels": 2}
    create_kernel_registry(loaded)
    assert calls == {"light_register_kernels": 2}


def test_end_to_end_in_a_fresh_process(site):
    site.install("good", architecture="GoodModel")
    explodes = "light_api = 1\nraise RuntimeError('imported')\n"
    site.install("late", explodes, requires=("light-core>=9",))
    site.install("fails", explodes)
    script = (
        "from light_core.errors import LightError\n"
        "from light_core.plugins import load_plugins, resolve_family\n"
        "import sys\n"
        "loaded = load_plugins()\n"
        "print(resolve_family(['GoodModel'], loaded).name)\n"
        "try: resolve_family(['NoModel'], loaded)\n"
        "except LightError as error: print(error.block())\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site.folder), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    family, error, cause, remedy = done.stdout.splitlines()
    assert family == "good" and error.startswith("error: no plugin serves NoModel")
    assert "light-plugin-late 1.0.0 (late) was not loaded: it needs light-core>=9, this is 1.0.0" in cause
    assert "light-plugin-fails 1.0.0 (fails) was not loaded: importing lp_fails.hooks: RuntimeError: imported" in cause
    assert remedy.startswith("try:") and "pip install -U 'light-core>=9'" in remedy
