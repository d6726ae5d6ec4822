"""What is installed is found and judged without being imported."""

import shutil
import subprocess
import sys
import time

import pytest

from light_core import __version__
from light_core.errors import PluginError
from light_core.plugins.discovery import discover, parse_names, select

EXPLODES = "light_api = {api}\nraise RuntimeError('imported')\n"


def find(site, name):
    (info,) = [info for info in discover(site.path) if info.ref.name == name]
    return info


def test_finds_distribution_version_and_module(site):
    site.install("alpha", version="1.2.3")
    info = find(site, "alpha")
    assert (info.ref.distribution, info.ref.version, info.ref.module) == ("light-plugin-alpha", "1.2.3", "lp_alpha.hooks")
    assert str(info) == "light-plugin-alpha 1.2.3 (alpha)"
    assert info.error is None and info.source == site.folder / "lp_alpha" / "hooks.py"
    assert info.requires == ("light-core",)


def test_core_is_always_first(site):
    site.install("alpha")
    core = discover(site.path)[0]
    assert (core.ref.name, core.ref.distribution, core.ref.version) == ("core", "light-core", __version__)
    assert core.error is None


@pytest.mark.parametrize(
    ("source", "cause", "remedy"),
    [
        (EXPLODES.format(api=2), "made for plugin API 2; light-core 1.0.0 has plugin API 1", "pip install -U light-core"),
        (EXPLODES.format(api=0), "made for plugin API 0", "pip install -U light-plugin-alpha"),
        ("raise RuntimeError('imported')", "does not say light_api", "write `light_api = 1` at the top level of hooks.py"),
        ("light_api = int('1')", "does not say light_api", "light-plugin-alpha"),
        ("light_api = True", "does not say light_api", "light-plugin-alpha"),
        ("def f():\n    light_api = 1", "does not say light_api", "light-plugin-alpha"),
        ("light_api = 1\nlight_api = 3", "made for plugin API 3", "pip install -U light-core"),
        ("light_api = (", "SyntaxError", "reinstall light-plugin-alpha"),
    ],
)
def test_api_version_is_checked_without_importing(site, source, cause, remedy):
    site.install("alpha", source)
    error = find(site, "alpha").error
    assert "light-plugin-alpha 1.0.0 (alpha)" in error.error
    assert cause in error.cause
    assert remedy in error.remedy
    assert "lp_alpha" not in sys.modules
    assert [line.split(":")[0] for line in error.block().splitlines()] == ["error", "cause", "try"]


@pytest.mark.parametrize("source", ["light_api = 1", "light_api: int = 1", "other = light_api = 1"])
def test_api_version_may_be_written_as_python_allows(site, source):
    site.install("alpha", source)
    assert find(site, "alpha").error is None


def test_needs_a_newer_core(site):
    site.install("alpha", EXPLODES.format(api=1), requires=("light-core>=9",))
    error = find(site, "alpha").error
    assert "light-plugin-alpha 1.0.0 (alpha)" in error.error
    assert f"needs light-core>=9, this is {__version__}" in error.cause
    assert "pip install -U 'light-core>=9'" in error.remedy


def test_needs_a_plugin_that_is_not_installed(site):
    site.install("alpha", requires=("light-core>=1", "light-plugin-beta>=1"))
    error = find(site, "alpha").error
    assert "needs light-plugin-beta>=1, which is not installed" in error.cause
    assert error.remedy == "pip install 'light-plugin-beta>=1'"


def test_needs_another_version_of_a_plugin(site):
    site.install("alpha", requires=("light-core>=1", "light-plugin-beta>=2"))
    site.install("beta")
    assert "needs light-plugin-beta>=2, this is 1.0.0" in find(site, "alpha").error.cause


def test_requirements_of_extras_and_other_machines_do_not_count(site):
    site.install("alpha", requires=("light-core>=9; extra == 'next'", "light-core>=9; sys_platform == 'none'", "numpy>=999"))
    assert find(site, "alpha").error is None


def test_malformed_requirement(site):
    site.install("alpha", requires=("light-core>>9",))
    error = find(site, "alpha").error
    assert "light-plugin-alpha 1.0.0" in error.error and "Requires-Dist" in error.cause and "light-plugin-alpha" in error.remedy


def test_module_that_is_not_there(site):
    site.install("alpha", module="lp_alpha.nothing")
    error = find(site, "alpha").error
    assert "lp_alpha.nothing" in error.cause and error.remedy == "pip install --force-reinstall light-plugin-alpha"


def test_entry_point_that_names_an_object(site):
    site.install("alpha", module="lp_alpha.hooks:plugin")
    assert "no module path" in find(site, "alpha").error.cause


def test_first_of_two_installations_of_a_distribution_counts(site, tmp_path):
    site.install("alpha", version="2.0.0")
    site.install("alpha", version="1.0.0", folder=tmp_path / "second")
    infos = [info for info in discover([*site.path, str(tmp_path / "second")]) if info.ref.name == "alpha"]
    assert [info.ref.version for info in infos] == ["2.0.0"]


def test_a_broken_uninstall_hides_only_itself(site, caplog):
    site.install("alpha")
    site.install("beta")
    (site.folder / "light_plugin_alpha-1.0.0.dist-info" / "METADATA").unlink()
    shutil.rmtree(site.folder / "lp_alpha")
    assert [info.ref.name for info in discover(site.path)] == ["core", "beta"]
    assert "without metadata" in caplog.text


@pytest.mark.parametrize("text", ["", " ", "a,,b", ",a"])
def test_empty_name(text):
    with pytest.raises(PluginError, match="empty name"):
        parse_names(text)


def test_names_count_once():
    assert parse_names(" a, b ,a") == ("a", "b")
    assert parse_names(None) == ()


def test_missing_name_lists_what_is_installed_and_near_misses(site):
    site.install("llama", version="1.4.0")
    with pytest.raises(PluginError) as caught:
        select(("lllama",), discover(site.path))
    assert "'lllama' is not installed" in caught.value.error
    assert "llama (light-plugin-llama 1.4.0)" in caught.value.cause
    assert "did you mean 'llama'" in caught.value.remedy and "pip install light-plugin-lllama" in caught.value.remedy


def test_distribution_name_in_the_place_of_the_entry_point(site):
    site.install("llama")
    with pytest.raises(PluginError) as caught:
        select(("light-plugin-llama",), discover(site.path))
    assert "did you mean 'llama'" in caught.value.remedy and "light-plugin-light-plugin" not in caught.value.remedy


def test_missing_file_and_missing_module(site):
    with pytest.raises(PluginError, match=r"hooks\.py does not exist"):
        select(("./nowhere/hooks.py",), discover(site.path))
    with pytest.raises(PluginError, match=r"'no_such_package\.hooks' is not found"):
        select(("no_such_package.hooks",), discover(site.path))


def test_duplicate_entry_point_names_both_distributions(site):
    site.install("alpha", entry="same")
    site.install("beta", entry="same", version="3.1.0")
    site.install("gamma")
    for names in ((), ("same",)):
        with pytest.raises(PluginError) as caught:
            select(names, discover(site.path))
        assert "plugin name 'same' is given by 2 distributions" in caught.value.error
        assert "light-plugin-alpha 1.0.0" in caught.value.cause and "light-plugin-beta 3.1.0" in caught.value.cause
        assert "pip uninstall light-plugin-alpha" in caught.value.remedy
    assert [info.ref.name for info in select(("gamma",), discover(site.path))] == ["core", "gamma"]


def test_requirements_come_along_and_first(site):
    site.install("vl", requires=("light-core>=1", "Light_Plugin.Text>=1"))
    site.install("text", requires=("light-core>=1", "light-plugin-base"))
    site.install("base")
    site.install("other")
    assert [info.ref.name for info in select(("vl",), discover(site.path))] == ["core", "base", "text", "vl"]
    assert [info.ref.name for info in select((), discover(site.path))] == ["core", "base", "other", "text", "vl"]


def test_circular_requirements_end(site):
    site.install("alpha", requires=("light-plugin-beta",))
    site.install("beta", requires=("light-plugin-alpha",))
    assert {info.ref.name for info in select(("alpha",), discover(site.path))} == {"core", "alpha", "beta"}


def test_sdk_comes_with_plugins_named_by_a_path(site, tmp_path):
    site.install("kit", entry="sdk")
    site.install("loose")
    file = tmp_path / "hooks.py"
    file.write_text("light_api = 1\n")
    installed = discover(site.path)
    assert [info.ref.name for info in select((str(file),), installed)] == ["core", "sdk", str(file)]
    assert [info.ref.name for info in select(("lp_kit.model",), installed)] == ["core", "sdk", "lp_kit.model"]
    assert [info.ref.name for info in select(("loose",), installed)] == ["core", "loose"]


def test_module_path_of_an_installed_plugin_is_that_plugin(site):
    site.install("alpha")
    (_, info) = select(("lp_alpha.hooks",), discover(site.path))
    assert info.ref.distribution == "light-plugin-alpha"


def test_discovery_is_fast_and_imports_no_torch(site):
    for name in ("one", "two", "three", "four", "five"):
        site.install(name)
    discover(site.path)
    timings = []
    for _ in range(5):
        start = time.thread_time()
        assert len(discover()) >= 6
        timings.append(time.thread_time() - start)
    assert min(timings) < 0.5, "processor time, the best of five"
    script = "import sys; from light_core.plugins import discover; discover(); assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
