"""Architectures and bundled models find their family."""

import pytest

from light_core.errors import ModelError, PluginError
from light_core.plugins import bundled_models, load_plugins, resolve_bundled, resolve_family


@pytest.fixture
def loaded(site):
    site.install("llama", architecture="LlamaForCausalLM")
    site.install("bloom", architecture="BloomForCausalLM")
    site.install("mistral", architecture="MistralForCausalLM")
    site.install("qwen", architecture="QWenLMHeadModel")
    return load_plugins(path=site.path)


def test_first_architecture_that_is_served(loaded):
    assert resolve_family(["LlamaForCausalLM"], loaded).name == "llama"
    assert resolve_family(["Unheard", "BloomForCausalLM", "LlamaForCausalLM"], loaded).name == "bloom"
    assert loaded.families.owner(resolve_family(["BloomForCausalLM"], loaded)).ref.name == "bloom"


def test_unknown_architecture_names_the_three_nearest(loaded):
    with pytest.raises(ModelError) as caught:
        resolve_family(["LlamaForCausalLm"], loaded)
    near = caught.value.cause.partition("nearest in spelling: ")[2].split(", ")
    assert len(near) == 3 and near[0] == "LlamaForCausalLM" and "QWenLMHeadModel" not in near
    assert "light-plugin-qwen 1.0.0 (qwen)" in caught.value.cause
    assert "pip install light-plugin-" in caught.value.remedy and "--model-plugin" not in caught.value.remedy


def test_named_plugins_that_do_not_serve_it(site, loaded):
    named = load_plugins("bloom", path=site.path)
    with pytest.raises(ModelError) as caught:
        resolve_family(["LlamaForCausalLM"], named)
    assert "leave out --model-plugin" in caught.value.remedy and "light-plugin-llama" not in caught.value.cause


def test_config_without_architectures(loaded):
    with pytest.raises(ModelError, match="no `architectures`"):
        resolve_family([], loaded)


def test_bundled_model(site, loaded):
    folder = site.folder / "lp_llama" / "demo"
    with pytest.raises(PluginError) as caught:
        resolve_bundled("demo-llama", loaded)
    assert (
        "light-plugin-llama 1.0.0 (llama)" in caught.value.cause
        and "pip install --force-reinstall light-plugin-llama" in caught.value.remedy
    )
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    family, found = resolve_bundled("demo-llama", loaded)
    assert (family.name, found) == ("llama", folder)
    assert bundled_models(loaded)["demo-llama"] == folder
    assert resolve_bundled("demo", loaded) is None


def test_two_plugins_ship_one_name(site):
    site.install("alpha")
    source = (site.folder / "lp_alpha" / "hooks.py").read_text()
    site.install(
        "beta", source.replace("MINE = 'alpha'", "MINE = 'beta'").replace("AlphaFor", "BetaFor").replace('"demo-" + MINE', '"demo-alpha"')
    )
    with pytest.raises(PluginError, match="bundled model 'demo-alpha' is announced twice") as caught:
        load_plugins(path=site.path)
    assert "light-plugin-alpha 1.0.0" in caught.value.cause and "light-plugin-beta 1.0.0" in caught.value.cause
