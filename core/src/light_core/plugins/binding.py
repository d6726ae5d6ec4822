"""Hooks' answers to one frozen `ModelRuntime`, which is all that the step loop holds of the plugins.

Not here: weights are loaded and KV memory is allocated by the engine, from what is bound here.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from light_core.errors import ConfigError, LightError, PluginError
from light_core.ops import Choice, KernelRegistry, Machine, OpTable
from light_core.plugins.layout import layout_problem
from light_core.plugins.loading import LoadedPlugins, create_kernel_registry
from light_core.plugins.refs import PluginInfo
from light_core.plugins.text_model import read_text_config, resolve_text_family
from light_core.types import ChatSpec, Family, KVLayout, Layer, Limits, MediaEncoder, ModelContext, PostLayer, PreLayer, Shard, WeightPlan

if TYPE_CHECKING:
    import torch

__all__ = ["ModelRuntime", "bind", "chat_spec", "describe_machine", "media_encoders", "plugin_tokenizer"]

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class ModelRuntime:
    """One model, bound: everything a step calls, and no way back to a plugin manager.

    Attributes:
        model: what the hooks were asked about; its op table is frozen.
        plugin: the plugin that serves the checkpoint's architecture.
        pre, layers, post: modules with uninitialised parameters on `model.device`.
        kv_layout: checked.
        weight_plan: where the tensors of the checkpoint go.
        media_encoders: () for a model that takes text only.
        choices: which kernel serves each use of an op, and why.
    """

    model: ModelContext
    plugin: PluginInfo
    pre: PreLayer
    layers: tuple[Layer, ...]
    post: PostLayer
    kv_layout: KVLayout
    weight_plan: WeightPlan
    media_encoders: tuple[MediaEncoder, ...]
    choices: tuple[Choice, ...]

    @property
    def modules(self) -> "dict[str, torch.nn.Module]":
        """Modules by the prefix of their parameters' names: "pre", "layers.0", …, "post", "media.{name}"."""
        named: dict[str, Any] = {"pre": self.pre}
        named |= {f"layers.{index}": layer for index, layer in enumerate(self.layers)}
        named["post"] = self.post
        named |= {f"media.{encoder.name}": encoder.module for encoder in self.media_encoders}
        return named


def describe_machine(device: str) -> Machine:
    """The machine behind a torch device string: "cpu", "cuda:0" or "meta"."""
    kind = device.partition(":")[0]
    if kind != "cuda":
        return Machine(kind, name=kind)
    import torch

    return Machine("cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def bind(
    loaded: LoadedPlugins,
    *,
    family: Family,
    config: Any,
    dtype: str,
    device: str,
    limits: Limits,
    shard: Shard = Shard(),  # noqa: B008  # frozen
    quantization: str | None = None,
    folder: str = "",
    machine: Machine | None = None,
    kernels: Mapping[str, str] = MappingProxyType({}),
    enforce_eager: bool = False,
) -> ModelRuntime:
    """Asks every model hook once and freezes the answers.

    Modules are built under `torch.device(device)` with `dtype` as torch's default; both are as before afterwards. On
    "meta" nothing is allocated: for shape checks.

    Args:
        loaded: the plugins.
        family: of the checkpoint, from `resolve_family`; where it says that the text model is of another family, that
            one is found here.
        config: of the checkpoint.
        dtype, device, limits, shard, quantization, folder, enforce_eager: as `ModelContext` has them.
        machine: where kernels run; None takes it from `device`.
        kernels: op to the name of the kernel that must serve it.

    Raises:
        PluginError: no plugin or more than one answers a hook, an answer is not what the hook asks for, the KV layout
            breaks a rule, or a hook failed.
        ConfigError: the family cannot serve this dtype, quantisation or tensor-parallel size, or a kernel named in
            `kernels` cannot serve.
        ModelError: no plugin serves the text model of a multimodal checkpoint.
    """
    _check_capabilities(family, dtype, shard, quantization)
    ops = OpTable(create_kernel_registry(loaded), machine or describe_machine(device), dtype, kernels)
    model = _context(loaded, ops, family=family, config=config, device=device, limits=limits, folder=folder)
    model = replace(model, shard=shard, quantization=quantization, enforce_eager=enforce_eager)
    _check_capabilities(model.family, dtype, shard, quantization)
    hooks = _ModelHooks(loaded, model)
    layout = hooks.one("light_kv_layout", KVLayout)
    if problem := layout_problem(layout):
        raise PluginError(f"the KV layout of family {family.name!r} is wrong", f"{hooks.owner}: {problem}", _repair(hooks.owner))
    plan = hooks.one("light_weight_plan", WeightPlan)
    num_layers = sum(len(group.layers) for group in layout.groups)
    with _building(device, model.torch_dtype):
        from torch.nn import Module

        pre = hooks.one("light_pre_layer", Module)
        layers = tuple(hooks.one("light_layer", Module, layer_id=layer_id) for layer_id in range(num_layers))
        post = hooks.one("light_post_layer", Module)
        encoders = tuple(hooks.one_or_none("light_media_encoders", tuple) or ())
    _check_encoders(encoders, loaded.families.owner(family))
    return ModelRuntime(
        model,
        loaded.families.owner(family),
        cast(PreLayer, pre),
        cast("tuple[Layer, ...]", layers),
        cast(PostLayer, post),
        layout,
        plan,
        encoders,
        ops.freeze(),
    )


def chat_spec(
    loaded: LoadedPlugins,
    *,
    family: Family,
    config: Any,
    limits: Limits,
    dtype: str = "float32",
    folder: str = "",
) -> ChatSpec:
    """What the family says about conversations; an empty `ChatSpec` where it says nothing. For the HTTP process: builds
    no layer, selects no kernel, imports no torch.

    Raises:
        PluginError: more than one plugin answers, or the hook failed.
    """
    model = _context(loaded, _no_ops(dtype), family=family, config=config, device="meta", limits=limits, folder=folder)
    return _ModelHooks(loaded, model).one_or_none("light_chat", ChatSpec) or ChatSpec()


def plugin_tokenizer(loaded: LoadedPlugins, *, family: Family, config: Any, limits: Limits, folder: str) -> Any | None:
    """The tokenizer that the family makes of the files in `folder`, a transformers tokenizer; None where transformers is to
    read them by itself. For every process that handles text: builds no layer, imports no torch.

    Raises:
        PluginError: more than one plugin answers, the hook failed, or its answer is no tokenizer.
        ModelError: a file of the tokenizer is not valid.
    """
    if not loaded.manager.hook.light_tokenizer.get_hookimpls():
        return None
    from transformers import PreTrainedTokenizerBase

    model = _context(loaded, _no_ops("float32"), family=family, config=config, device="meta", limits=limits, folder=folder)
    return _ModelHooks(loaded, model).one_or_none("light_tokenizer", PreTrainedTokenizerBase)


def media_encoders(
    loaded: LoadedPlugins, *, family: Family, config: Any, limits: Limits, dtype: str = "float32", folder: str = ""
) -> tuple[MediaEncoder, ...]:
    """The encoders of the model with modules that hold no memory, for a process that preprocesses and encodes nothing.

    Raises:
        PluginError: more than one plugin answers, the hook failed, or its answer is not what it asks for.
    """
    if not loaded.manager.hook.light_media_encoders.get_hookimpls():
        return ()
    ops = OpTable(create_kernel_registry(loaded), Machine("meta", name="meta"), dtype)
    model = _context(loaded, ops, family=family, config=config, device="meta", limits=limits, folder=folder)
    hooks = _ModelHooks(loaded, model)
    with _building("meta", model.torch_dtype):
        encoders = tuple(hooks.one_or_none("light_media_encoders", tuple) or ())
    _check_encoders(encoders, loaded.families.owner(family))
    return encoders


def _context(loaded: LoadedPlugins, ops: OpTable, *, family: Family, config: Any, device: str, limits: Limits, folder: str) -> ModelContext:
    """What hooks are asked about: of a multimodal checkpoint the text model, with the checkpoint beside it."""
    text = read_text_config(family, config)
    return ModelContext(
        family=resolve_text_family(family, text, loaded),
        config=text,
        dtype=ops.dtype,
        device=device,
        ops=ops,
        limits=limits,
        folder=folder,
        checkpoint_family=family,
        checkpoint_config=config,
    )


def _no_ops(dtype: str) -> OpTable:
    """An op table for hooks that build nothing."""
    ops = OpTable(KernelRegistry(), Machine("meta", name="meta"), dtype)
    ops.freeze()
    return ops


def _check_capabilities(family: Family, dtype: str, shard: Shard, quantization: str | None) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known", f"allowed: {', '.join(DTYPES)}", "set dtype to one of them")
    if shard.size > family.max_tensor_parallel:
        cause = f"family {family.name!r} can be cut over {family.max_tensor_parallel}"
        raise ConfigError(f"tensor-parallel size {shard.size} is too much", cause, f"use {family.max_tensor_parallel} or less")
    if quantization is not None and quantization not in family.quantization:
        cause = f"family {family.name!r} loads {', '.join(family.quantization) or 'plain weights only'}"
        raise ConfigError(f"quantization {quantization!r} cannot be served", cause, "use another checkpoint of the model")


def _check_encoders(encoders: tuple[Any, ...], owner: PluginInfo) -> None:
    if strange := [type(encoder).__name__ for encoder in encoders if not isinstance(encoder, MediaEncoder)]:
        raise PluginError(
            "light_media_encoders was answered wrongly", f"{owner}: a {strange[0]} among the encoders, not a MediaEncoder", _repair(owner)
        )
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise PluginError("media encoders share a name", f"{owner}: {', '.join(names)}", _repair(owner))


@contextmanager
def _building(device: str, dtype: "torch.dtype") -> Iterator[None]:
    """torch's default device and dtype, as they were before when the block ends."""
    import torch

    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)


class _ModelHooks:
    """Asks the hooks about one model and holds the plugins to one answer."""

    def __init__(self, loaded: LoadedPlugins, model: ModelContext) -> None:
        self.loaded, self.model = loaded, model
        self.owner = loaded.families.owner(model.family)

    def one(self, hook: str, kind: type[Answer], **arguments: Any) -> Answer:
        """The one answer to `hook`, a `kind`."""
        answer = self.one_or_none(hook, kind, **arguments)
        if answer is None:
            where = f" for layer {arguments['layer_id']}" if arguments else ""
            raise PluginError(
                f"no plugin answers {hook} for family {self.model.family.name!r}{where}",
                f"{self.owner} announces the family; plugins asked: {', '.join(map(str, self.loaded.plugins))}",
                f"implement {hook} in {self.owner.ref.module}, or {_repair(self.owner)}",
            )
        return answer

    def one_or_none(self, hook: str, kind: type[Answer], **arguments: Any) -> Answer | None:
        """As `one`; None where nobody answers."""
        given = {"model": self.model, **arguments}
        try:
            answers = getattr(self.loaded.manager.hook, hook)(**given)
        except LightError:
            raise
        except Exception as error:
            culprit = self._culprit(error)
            raise PluginError(f"plugin {culprit} failed in {hook}", f"{type(error).__name__}: {error}", _repair(culprit)) from error
        if not isinstance(answers, list):
            cause = f"a wrapper returned a {type(answers).__name__} in the place of the list of answers; wrappers: {self._wrappers(hook)}"
            raise PluginError(f"{hook} was wrapped wrongly", cause, "return a list from the wrapper")
        answers = [answer for answer in answers if answer is not None]
        if len(answers) > 1:
            raise self._too_many(hook, given, len(answers))
        if answers and not isinstance(answers[0], kind):
            cause = f"{self.owner}: a {type(answers[0]).__name__}, not a {kind.__name__}"
            raise PluginError(f"{hook} was answered wrongly for family {self.model.family.name!r}", cause, _repair(self.owner))
        return answers[0] if answers else None

    def _too_many(self, hook: str, given: Mapping[str, Any], count: int) -> PluginError:
        """Asks again, plugin by plugin, because pluggy does not tell who answered."""
        answering = []
        for implementation in getattr(self.loaded.manager.hook, hook).get_hookimpls():
            if not (implementation.wrapper or implementation.hookwrapper):
                answer = implementation.function(*(given[name] for name in implementation.argnames))
                if answer is not None:
                    answering.append(self.loaded.info(implementation.plugin_name))
        wrapped = self._wrappers(hook)
        return PluginError(
            f"{hook} has {count} answers for family {self.model.family.name!r}, one is needed",
            f"answered by {', '.join(map(str, answering))}" + (f"; wrapped by {wrapped}" if wrapped else ""),
            f"name one with --model-plugin, or uninstall the others; a plugin answers for its own family alone (here {self.owner}'s)",
        )

    def _wrappers(self, hook: str) -> str:
        implementations = getattr(self.loaded.manager.hook, hook).get_hookimpls()
        return ", ".join(str(self.loaded.info(one.plugin_name)) for one in implementations if one.wrapper or one.hookwrapper)

    def _culprit(self, error: BaseException) -> PluginInfo:
        """The plugin whose module is deepest in the traceback of `error`."""
        by_module = {info.ref.module: info for info in self.loaded.plugins}
        culprit, trace = self.owner, error.__traceback__
        while trace is not None:
            culprit = by_module.get(trace.tb_frame.f_globals.get("__name__", ""), culprit)
            trace = trace.tb_next
        return culprit


def _repair(info: PluginInfo) -> str:
    return f"install another version of {info.ref.distribution}" if info.ref.distribution else f"correct {info.source or info.ref.module}"
