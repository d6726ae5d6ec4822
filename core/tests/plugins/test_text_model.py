"""A multimodal checkpoint's text model is bound by its own family, and the vision plugin adds to it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig

from light_core.engine.model_files import read_config, resolve_dtype, resolve_max_model_len, text_files
from light_core.errors import ConfigError, ModelError, PluginError
from light_core.plugins import bind, chat_spec, load_plugins, media_encoders, plugin_tokenizer, resolve_family
from light_core.types import Limits

LIMITS = Limits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
SIGHT = """
    from light_core.hookspecs import hookimpl
    from light_core.types import ChatSpec, Family, MediaEncoder

    light_api = 1


    @hookimpl
    def light_register_families(registry):
        registry.add(Family("sight", ("SightModel",), media=("image",), {family}))


    @hookimpl
    def light_media_encoders(model):
        import torch

        if model.checkpoint_family.name == "sight":
            assert model.checkpoint_config.size, "the whole configuration"
            module = torch.nn.Linear(model.checkpoint_config.size, 2)
            return (MediaEncoder("image", "image", len, len, module),)


    @hookimpl(wrapper=True)
    def light_pre_layer(model):
        import torch

        answers = yield
        return [torch.nn.Sequential(answer) for answer in answers] if model.checkpoint_family.name == "sight" else answers


    @hookimpl(wrapper=True)
    def light_chat(model):
        answers = yield
        return [ChatSpec(template="seeing " + answer.template) for answer in answers]
"""


def install(site, family='text_config="text_config"', text="AlphaForCausalLM"):
    site.install("alpha", architecture=text)
    site.install("sight", SIGHT.format(family=family))
    loaded = load_plugins(path=site.path)
    return loaded, resolve_family(["SightModel"], loaded)


def configuration(**changes):
    return SimpleNamespace(size=3, text_config=SimpleNamespace(**{"architectures": ["AlphaForCausalLM"], "num_hidden_layers": 2} | changes))


def settings(config):
    return {"config": config, "dtype": "float32", "device": "cpu", "limits": LIMITS}


def test_the_text_family_builds_and_the_vision_plugin_adds(site):
    loaded, family = install(site)
    config = configuration()
    runtime = bind(loaded, family=family, **settings(config))
    assert (runtime.model.family.name, runtime.model.checkpoint_family.name) == ("alpha", "sight")
    assert runtime.model.config is config.text_config and runtime.model.checkpoint_config is config
    assert runtime.plugin.ref.name == "sight", "who serves the checkpoint"
    assert [type(layer).__module__ for layer in runtime.layers] == ["lp_alpha.model"] * 2
    assert type(runtime.pre) is torch.nn.Sequential and list(runtime.modules)[-1] == "media.image"


def test_a_text_checkpoint_is_left_alone(site):
    loaded, _ = install(site)
    config = SimpleNamespace(num_hidden_layers=1)
    runtime = bind(loaded, family=resolve_family(["AlphaForCausalLM"], loaded), **settings(config))
    assert runtime.model.family is runtime.model.checkpoint_family and runtime.model.checkpoint_config is config
    assert type(runtime.pre).__name__ == "Pre" and runtime.media_encoders == ()


def test_a_text_model_without_architectures_goes_by_its_type(site):
    loaded, family = install(site, text="LlamaForCausalLM")
    config = SimpleNamespace(size=3, text_config=LlamaConfig(num_hidden_layers=2))
    assert bind(loaded, family=family, **settings(config)).model.family.name == "alpha"


def test_a_text_model_of_plain_entries_becomes_its_types_configuration(site):
    loaded, family = install(site, text="LlamaForCausalLM")
    config = SimpleNamespace(size=3, text_config={"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64})
    model = bind(loaded, family=family, **settings(config)).model
    assert type(model.config) is LlamaConfig and model.config.hidden_size == 64


def test_a_type_that_the_family_names_goes_before_everything_else(site):
    """Where transformers has types for the text half of a multimodal model that no plugin would know."""
    loaded, family = install(site, 'text_config="text_config", text_model_type="llama"', text="LlamaForCausalLM")
    text = SimpleNamespace(architectures=["SightModel"], model_type="sight_text", num_hidden_layers=2)
    model = bind(loaded, family=family, **settings(SimpleNamespace(size=3, text_config=text))).model
    assert model.family.name == "alpha" and model.config is text


def test_the_checkpoint_says_whether_the_head_is_tied(site):
    loaded, family = install(site, text="LlamaForCausalLM")
    text = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True)
    for tied in (True, False):
        config = SimpleNamespace(size=3, text_config=text, tie_word_embeddings=tied)
        assert bind(loaded, family=family, **settings(config)).model.config.tie_word_embeddings is tied
    assert text.tie_word_embeddings, "the checkpoint's own configuration stays as it is"


def test_entries_beside_the_checkpoints_own(site):
    loaded, family = install(site, 'text_config="", text_model_type="llama"', text="LlamaForCausalLM")
    config = PretrainedConfig(size=3, num_hidden_layers=2, hidden_size=64, architectures=["SightModel"], vision={"model_type": "clip"})
    model = bind(loaded, family=family, **settings(config)).model
    assert type(model.config) is LlamaConfig and (model.config.num_hidden_layers, model.config.hidden_size) == (2, 64)
    assert model.family.name == "alpha" and not hasattr(model.config, "vision")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SimpleNamespace(size=3), "names no text model"),
        (SimpleNamespace(size=3, text_config={"hidden_size": 4}), "type is unknown"),
        (configuration(architectures=["OmegaForCausalLM"]), "cannot be served: no plugin serves OmegaForCausalLM"),
        (configuration(architectures=["SightModel"]), "multimodal itself"),
        (configuration(architectures=None, model_type="nothing"), "cannot be served"),
    ],
)
def test_what_cannot_be_served_is_said(site, config, message):
    loaded, family = install(site)
    with pytest.raises(ModelError, match=message):
        bind(loaded, family=family, **settings(config))


def test_both_families_must_be_able_to(site):
    loaded, family = install(site, 'text_config="text_config", quantization=("fp8",)')
    with pytest.raises(ConfigError, match="fp8"):
        bind(loaded, family=family, **settings(configuration()), quantization="fp8")


def test_encoders_for_a_process_that_computes_nothing(site):
    loaded, family = install(site)
    (encoder,) = media_encoders(loaded, family=family, config=configuration(), limits=LIMITS)
    assert encoder.module.weight.device.type == "meta" and encoder.num_tokens({"a": 1}) == 1
    alpha = resolve_family(["AlphaForCausalLM"], loaded)
    assert media_encoders(loaded, family=alpha, config=SimpleNamespace(), limits=LIMITS) == ()


def test_conversations_are_the_text_familys_unless_wrapped(site):
    loaded, family = install(site)
    assert chat_spec(loaded, family=family, config=configuration(), limits=LIMITS).template == "seeing chat of alpha"


def test_length_and_dtype_are_the_text_models(site, tmp_path):
    _, family = install(site)
    text = '{"model_type": "llama", "max_position_embeddings": 77, "dtype": "float16"}'
    (tmp_path / "config.json").write_text('{"architectures": ["SightModel"], "max_position_embeddings": 5, "text_config": ' + text + "}")
    files = text_files(read_config(tmp_path, {}), family)
    assert resolve_max_model_len(files, None) == 77 and resolve_dtype(files, "auto", "cuda:0") == "float16"
    whole = text_files(read_config(tmp_path, {"dtype": "bfloat16"}), family)
    assert resolve_dtype(whole, "auto", "cuda:0") == "bfloat16", "the checkpoint's own comes first"


TOKENIZER = """
    from light_core.hookspecs import hookimpl

    light_api = 1


    @hookimpl
    def light_tokenizer(model):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        if model.config is not None:
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({{"a": 0}})), unk_token=model.folder) {answer}
"""


def test_a_plugin_may_make_the_tokenizer(site):
    site.install("alpha")
    loaded = load_plugins(path=site.path)
    about = {"family": resolve_family(["AlphaForCausalLM"], loaded), "limits": LIMITS, "folder": "here"}
    assert plugin_tokenizer(loaded, config=SimpleNamespace(), **about) is None, "no plugin has the hook"
    site.install("words", TOKENIZER.format(answer=""))
    loaded = load_plugins(path=site.path)
    assert plugin_tokenizer(loaded, config=SimpleNamespace(), **about).unk_token == "here"
    assert plugin_tokenizer(loaded, config=None, **about) is None
    assert "lp_alpha.model" not in sys.modules


def test_what_is_no_tokenizer_is_refused(site):
    site.install("alpha")
    site.install("words", TOKENIZER.format(answer="and 3"))
    loaded = load_plugins(path=site.path)
    with pytest.raises(PluginError, match="light_tokenizer was answered wrongly"):
        plugin_tokenizer(
            loaded, family=resolve_family(["AlphaForCausalLM"], loaded), config=SimpleNamespace(), limits=LIMITS, folder="here"
        )
