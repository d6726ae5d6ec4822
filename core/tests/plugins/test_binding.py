"""Hooks' answers become one frozen runtime, or an error that names who answered."""

import dataclasses
import gc
import sys
from types import FunctionType, ModuleType, SimpleNamespace

import pluggy
import pytest
import torch

from light_core.errors import ConfigError, LightError, PluginError
from light_core.ops import Machine
from light_core.plugins import bind, chat_spec, count_hook_calls, describe_machine, load_plugins, resolve_family
from light_core.types import ChatSpec, Limits, MediaEncoder, Shard

LIMITS = Limits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
HEADER = "from light_core.hookspecs import hookimpl\nfrom light_core.types import *\nlight_api = 1\n"


def bound(site, names=None, architecture="AlphaForCausalLM", num_layers=3, **changes):
    loaded = load_plugins(names, path=site.path)
    family = resolve_family([architecture], loaded)
    settings = {"dtype": "float32", "device": "cpu", "limits": LIMITS, "config": SimpleNamespace(num_hidden_layers=num_layers)} | changes
    return bind(loaded, family=family, **settings)


def refused(site, *arguments, **changes):
    with pytest.raises(PluginError) as caught:
        bound(site, *arguments, **changes)
    return caught.value


def test_binds_each_part_to_its_place(site):
    site.install("alpha")
    site.install("beta")
    runtime = bound(site)
    assert type(runtime.pre).__name__ == "Pre" and type(runtime.post).__name__ == "Post"
    assert type(runtime.pre).__module__ == "lp_alpha.model"
    assert [layer.layer_id for layer in runtime.layers] == [0, 1, 2]
    assert runtime.kv_layout.groups[0].layers == (0, 1, 2)
    assert runtime.media_encoders == ()
    assert str(runtime.plugin) == "light-plugin-alpha 1.0.0 (alpha)"
    assert list(runtime.modules) == ["pre", "layers.0", "layers.1", "layers.2", "post"]
    assert [(choice.op, choice.kernel) for choice in runtime.choices] == [("double_alpha", "reference")]
    assert runtime.pre.double(torch.ones(1)).item() == 2
    assert resolve_family(["BetaForCausalLM"], load_plugins(path=site.path)).name == "beta"


def test_runtime_is_frozen_and_its_ops_with_it(site):
    site.install("alpha")
    runtime = bound(site)
    with pytest.raises(dataclasses.FrozenInstanceError):
        runtime.layers = ()
    with pytest.raises(PluginError, match="selected after loading"):
        runtime.model.ops.select("double_alpha", size=5)


def test_no_plugin_manager_is_reachable_from_a_runtime(site):
    site.install("alpha")
    runtime = bound(site)
    seen, todo = set(), [runtime]
    while todo:
        one = todo.pop()
        assert not isinstance(one, (pluggy.PluginManager, pluggy.HookCaller))
        if id(one) in seen or isinstance(one, (ModuleType, FunctionType, type)):
            continue
        seen.add(id(one))
        todo += gc.get_referents(one)
    assert len(seen) > 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_are_built_with_device_and_dtype_which_are_restored(site, dtype, device):
    site.install("alpha")
    runtime = bound(site, dtype=dtype, device=device)
    parameters = [parameter for module in runtime.modules.values() for parameter in module.parameters()]
    assert len(parameters) == 5
    assert {(parameter.dtype, parameter.device.type) for parameter in parameters} == {(getattr(torch, dtype), device)}
    assert torch.get_default_dtype() == torch.float32 and torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("eager", [False, True])
def test_plugins_are_told_whether_anything_may_be_captured(site, eager):
    site.install("alpha")
    assert bound(site, enforce_eager=eager).model.enforce_eager is eager


def test_device_and_dtype_are_restored_after_a_failure(site):
    site.install("alpha")
    (site.folder / "lp_alpha" / "model.py").write_text("def Pre(model):\n    raise KeyError('hidden_size')\n")
    error = refused(site, dtype="bfloat16", device="meta")
    assert "light-plugin-alpha 1.0.0 (alpha) failed in light_pre_layer" in error.error
    assert "KeyError: 'hidden_size'" in error.cause and "light-plugin-alpha" in error.remedy
    assert torch.get_default_dtype() == torch.float32 and torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("hook", ["light_kv_layout", "light_weight_plan", "light_pre_layer", "light_layer", "light_post_layer"])
def test_missing_answer_names_the_hook_and_the_plugin(site, hook):
    site.install("alpha")
    source = site.folder / "lp_alpha" / "hooks.py"
    source.write_text(source.read_text().replace(f"@hookimpl\ndef {hook}(", f"def no_{hook}("))
    error = refused(site)
    assert f"no plugin answers {hook} for family 'alpha'" in error.error
    assert "light-plugin-alpha 1.0.0 (alpha)" in error.cause
    assert f"implement {hook} in lp_alpha.hooks" in error.remedy


def test_missing_layer_is_told_by_its_number(site):
    site.install("alpha")
    source = site.folder / "lp_alpha" / "hooks.py"
    source.write_text(
        source.read_text().replace('".model").Layer(model, layer_id)', '".model").Layer(model, layer_id) if layer_id < 2 else None')
    )
    assert "for layer 2" in refused(site).error


@pytest.mark.parametrize(
    ("hook", "arguments", "answer"),
    [
        ("light_kv_layout", "model", "KVLayout(())"),
        ("light_weight_plan", "model", "WeightPlan(())"),
        ("light_post_layer", "model", "object()"),
        ("light_layer", "model, layer_id", "object()"),
    ],
)
def test_two_answers_name_both(site, hook, arguments, answer):
    site.install("alpha", version="1.1.0")
    site.install("greedy", HEADER + f"@hookimpl\ndef {hook}({arguments}):\n    return {answer}\n", version="0.3.0")
    error = refused(site)
    assert f"{hook} has 2 answers for family 'alpha'" in error.error
    assert "light-plugin-alpha 1.1.0 (alpha)" in error.cause and "light-plugin-greedy 0.3.0 (greedy)" in error.cause
    assert "--model-plugin" in error.remedy
    assert bound(site, "alpha").plugin.ref.name == "alpha"


@pytest.mark.parametrize(
    ("hook", "kind"), [("light_kv_layout", "KVLayout"), ("light_weight_plan", "WeightPlan"), ("light_post_layer", "Module")]
)
def test_answer_of_the_wrong_kind(site, hook, kind):
    site.install("alpha")
    source = site.folder / "lp_alpha" / "hooks.py"
    source.write_text(source.read_text().replace(f"def {hook}(model):\n", f"def {hook}(model):\n    return 'text'\n"))
    error = refused(site)
    assert hook in error.error and f"light-plugin-alpha 1.0.0 (alpha): a str, not a {kind}" in error.cause


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("KVLayout(())", "no layers"),
        ("KVLayout((KVGroup((0, 2), ()),))", "missing: [1]"),
        ("KVLayout((KVGroup((0, 1), ()), KVGroup((1,), ())))", "twice: [1]"),
        ("KVLayout((KVGroup((-1, 0), ()),))", "below 0: [-1]"),
        ("KVLayout((KVGroup((0,), (KVPlane('k', (2, 0), 'float32'),)),))", "shape (2, 0)"),
        ("KVLayout((KVGroup((0,), (KVPlane('k', (2,), 'float33'),)),))", "dtype 'float33'"),
        ("KVLayout((KVGroup((0,), (KVPlane('k', (2,), 'Tensor'),)),))", "dtype 'Tensor'"),
        ("KVLayout((KVGroup((0,), (KVPlane('k', (2,), 'int8'), KVPlane('k', (2,), 'int8'))),))", "share a name: k, k"),
        ("KVLayout((KVGroup((0,), (), window=0),))", "window 0"),
        ("KVLayout((KVGroup((0,), ()),), max_shared_len=-1)", "max_shared_len is -1"),
    ],
)
def test_layout_rules(site, layout, problem):
    site.install("alpha")
    source = site.folder / "lp_alpha" / "hooks.py"
    source.write_text(source.read_text().replace("def light_kv_layout(model):\n", f"def light_kv_layout(model):\n    return {layout}\n"))
    error = refused(site)
    assert "KV layout of family 'alpha'" in error.error
    assert problem in error.cause and "light-plugin-alpha 1.0.0" in error.cause


def test_layout_of_layers_that_differ(site):
    """MLA planes, scalar scales, a window, and layers without KV, in no particular order."""
    site.install("alpha")
    layout = (
        "KVLayout((KVGroup((3, 1), (KVPlane('latent', (512,), 'bfloat16'), KVPlane('rope', (64,), 'bfloat16'))),"
        " KVGroup((0,), (KVPlane('k', (2, 4), 'float8_e4m3fn'), KVPlane('k_scale', (), 'float32')), window=8), KVGroup((2,), ())))"
    )
    source = site.folder / "lp_alpha" / "hooks.py"
    source.write_text(source.read_text().replace("def light_kv_layout(model):\n", f"def light_kv_layout(model):\n    return {layout}\n"))
    assert [layer.layer_id for layer in bound(site).layers] == [0, 1, 2, 3]


WRAPPERS = """
@hookimpl(wrapper=True)
def {hook}({arguments}):
    answers = yield
    return [{answer} for answer in answers]
"""


def test_reward_head_in_the_place_of_any_post_layer(site):
    site.install("alpha")
    head = (
        "import torch\n\nclass RewardHead(torch.nn.Module):\n    def __init__(self, answer):\n        super().__init__()\n"
        "        self.replaced = type(answer).__name__\n        self.score = torch.nn.Parameter(torch.empty(1, 4))\n"
    )
    (site.folder / "lp_reward_model.py").write_text(head)
    wrapper = WRAPPERS.format(
        hook="light_post_layer",
        arguments="model",
        answer="__import__('lp_reward_model').RewardHead(answer) if model.config.reward else answer",
    )
    site.install("reward", HEADER + wrapper, requires=("light-core>=1", "light-plugin-alpha"))
    post = bound(site, "reward", config=SimpleNamespace(num_hidden_layers=1, reward=True), dtype="bfloat16", device="meta").post
    assert post.replaced == "Post" and post.score.dtype == torch.bfloat16 and post.score.is_meta
    assert type(bound(site, "reward", config=SimpleNamespace(num_hidden_layers=1, reward=False)).post).__name__ == "Post"


@pytest.mark.parametrize(
    ("hook", "arguments", "answer", "changed"),
    [
        ("light_kv_layout", "model", "KVLayout(answer.groups, max_shared_len=7)", lambda runtime: runtime.kv_layout.max_shared_len == 7),
        (
            "light_weight_plan",
            "model",
            "WeightPlan(answer.placements, ignored=('x',))",
            lambda runtime: runtime.weight_plan.ignored == ("x",),
        ),
        ("light_pre_layer", "model", "setattr(answer, 'wrapped', 1) or answer", lambda runtime: runtime.pre.wrapped == 1),
        (
            "light_layer",
            "model, layer_id",
            "setattr(answer, 'wrapped', layer_id) or answer",
            lambda runtime: [layer.wrapped for layer in runtime.layers] == [0, 1, 2],
        ),
        ("light_post_layer", "model", "setattr(answer, 'wrapped', 1) or answer", lambda runtime: runtime.post.wrapped == 1),
    ],
)
def test_wrappers_of_every_hook(site, hook, arguments, answer, changed):
    site.install("alpha")
    site.install("around", HEADER + WRAPPERS.format(hook=hook, arguments=arguments, answer=answer))
    assert changed(bound(site))


def test_wrapper_of_media_encoders_adds_to_what_others_answer(site):
    site.install("alpha")
    site.install("vision", HEADER + ENCODERS.format("MediaEncoder('image', 'image', dict, len, None)"))
    more = "(*answer, MediaEncoder('audio', 'audio', dict, len, None))"
    site.install("around", HEADER + WRAPPERS.format(hook="light_media_encoders", arguments="model", answer=more))
    assert [encoder.name for encoder in bound(site).media_encoders] == ["image", "audio"]


def test_wrappers_of_dependents_go_outermost(site):
    site.install("alpha")
    wrap = "ChatSpec(template=answer.template + '{}')"
    site.install("inner", HEADER + WRAPPERS.format(hook="light_chat", arguments="model", answer=wrap.format(" inner")))
    outer = HEADER + WRAPPERS.format(hook="light_chat", arguments="model", answer=wrap.format(" outer"))
    site.install("around", outer, requires=("light-core", "light-plugin-inner"))
    loaded = load_plugins("around,alpha", path=site.path)
    family = resolve_family(["AlphaForCausalLM"], loaded)
    assert chat_spec(loaded, family=family, config=None, limits=LIMITS).template == "chat of alpha inner outer"


def test_wrapper_that_returns_no_list(site):
    site.install("alpha")
    site.install("around", HEADER + "@hookimpl(wrapper=True)\ndef light_post_layer(model):\n    answers = yield\n    return answers[0]\n")
    error = refused(site)
    assert "light_post_layer was wrapped wrongly" in error.error
    assert "a Post in the place of the list" in error.cause and "light-plugin-around 1.0.0 (around)" in error.cause


def test_failure_in_a_wrapper_names_the_wrapper(site):
    site.install("alpha")
    site.install("around", HEADER + "@hookimpl(wrapper=True)\ndef light_post_layer(model):\n    yield\n    raise ValueError('rank')\n")
    error = refused(site)
    assert "light-plugin-around 1.0.0 (around) failed in light_post_layer" in error.error and "ValueError: rank" in error.cause


def test_errors_of_plugins_pass_as_they_are(site):
    site.install("alpha")
    body = "@hookimpl(wrapper=True)\ndef light_post_layer(model):\n    yield\n    raise ConfigError('rank is odd')\n"
    site.install("around", "from light_core.errors import ConfigError\n" + HEADER + body)
    with pytest.raises(ConfigError, match="rank is odd"):
        bound(site)


ENCODERS = "@hookimpl\ndef light_media_encoders(model):\n    import torch\n    return ({},)\n"


def test_media_encoders_of_another_plugin(site):
    site.install("alpha")
    encoder = "MediaEncoder('image', 'image', dict, len, torch.nn.Linear(2, 2))"
    site.install("vision", HEADER + ENCODERS.format(encoder))
    runtime = bound(site, dtype="bfloat16")
    assert isinstance(runtime.media_encoders[0], MediaEncoder)
    assert runtime.modules["media.image"].weight.dtype == torch.bfloat16
    assert runtime.plugin.ref.name == "alpha"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("MediaEncoder('a', 'image', dict, len, None), MediaEncoder('a', 'image', dict, len, None)", "share a name"),
        ("'image'", "answered wrongly"),
    ],
)
def test_media_encoders_that_cannot_be(site, answer, problem):
    site.install("alpha")
    site.install("vision", HEADER + ENCODERS.format(answer))
    assert problem in refused(site).error


def test_chat_spec_builds_nothing(site):
    site.install("alpha")
    loaded = load_plugins("alpha", path=site.path)
    family = resolve_family(["AlphaForCausalLM"], loaded)
    with count_hook_calls(loaded) as calls:
        spec = chat_spec(loaded, family=family, config=None, limits=LIMITS)
    assert spec == ChatSpec(template="chat of alpha")
    assert calls == {"light_chat": 1} and "lp_alpha.model" not in sys.modules


def test_chat_spec_of_a_family_that_says_nothing(site):
    site.install("alpha", HEADER + "@hookimpl\ndef light_register_families(registry):\n    registry.add(Family('alpha', ('A',)))\n")
    loaded = load_plugins("alpha", path=site.path)
    assert chat_spec(loaded, family=resolve_family(["A"], loaded), config=None, limits=LIMITS) == ChatSpec()


def test_each_hook_is_asked_once(site):
    site.install("alpha")
    loaded = load_plugins("alpha", path=site.path)
    config = SimpleNamespace(num_hidden_layers=3)
    with count_hook_calls(loaded) as calls:
        bind(loaded, family=resolve_family(["AlphaForCausalLM"], loaded), config=config, dtype="float32", device="cpu", limits=LIMITS)
    assert calls.pop("light_register_kernels") == len(loaded.plugins)
    assert calls == {
        "light_kv_layout": 1,
        "light_weight_plan": 1,
        "light_pre_layer": 1,
        "light_layer": 3,
        "light_post_layer": 1,
        "light_media_encoders": 1,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is not known"),
        ({"shard": Shard(0, 2)}, "tensor-parallel size 2"),
        ({"quantization": "fp8"}, "quantization 'fp8'"),
        ({"kernels": {"nothing": "triton"}}, "unknown op 'nothing'"),
        ({"kernels": {"double_alpha": "triton"}}, "no kernel of op 'double_alpha'"),
    ],
)
def test_what_a_family_cannot_do(site, changes, message):
    site.install("alpha")
    with pytest.raises(ConfigError, match=message):
        bound(site, **changes)


def test_kernel_of_an_op_that_nobody_declares(site):
    site.install("alpha")
    site.install("kernels", HEADER + "from light_core.ops import Kernel\n@hookimpl\ndef light_register_kernels(registry):\n"
                 "    registry.kernel(Kernel('unheard', 'triton', 'lp_kernels.unheard:run'))\n")  # fmt: skip
    error = refused(site)
    assert "lp_kernels.unheard:run" in error.error
    assert "light-plugin-kernels 1.0.0 (kernels)" in error.cause


def test_machines():
    assert describe_machine("cpu") == Machine("cpu")
    assert describe_machine("meta").device == "meta"


def test_every_refusal_is_three_lines(site):
    site.install("alpha")
    site.install("greedy", HEADER + "@hookimpl\ndef light_kv_layout(model):\n    return KVLayout(())\n")
    with pytest.raises(LightError) as caught:
        bound(site)
    assert [line.partition(":")[0] for line in caught.value.block().splitlines()] == ["error", "cause", "try"]


def test_a_wrapped_module_can_keep_its_parameters_names(site):
    """A vision plugin puts itself before the embedding, and the text family's weight plan still fits."""
    site.install("alpha")
    wrapper = (
        "import torch\n\nclass MediaPre(torch.nn.Module):\n    def __init__(self, inner):\n        super().__init__()\n"
        "        object.__setattr__(self, 'inner', inner)\n"
        "        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers\n"
    )
    (site.folder / "lp_media_model.py").write_text(wrapper)
    body = WRAPPERS.format(hook="light_pre_layer", arguments="model", answer="__import__('lp_media_model').MediaPre(answer)")
    site.install("media", HEADER + body)
    pre = bound(site).pre
    assert type(pre).__name__ == "MediaPre"
    assert list(pre.state_dict()) == ["embedding"]
    assert pre.embedding is pre.inner.embedding
