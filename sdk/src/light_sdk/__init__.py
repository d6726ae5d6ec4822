"""What a model plugin is written with: the contract's names, here, and the building blocks, in the modules below.

    light_sdk           hookimpl, Family, ModelContext, Step, KVLayout, …: what hooks are given and answer with
    light_sdk.layers    torch modules that a family's model.py is made of (imports torch; import it from there)
    light_sdk.weights   WeightPlanBuilder
    light_sdk.graphs    ShapeGraphs, CUDA graphs of an encoder (imports torch; import it from there)
    light_sdk.testing   the conformance kit and the echo family
    light_sdk.scaffold  a new plugin package from an installed family

A plugin imports `light_sdk` alone, never `light_core`. This module imports no torch, so that hooks stay cheap.
"""

from light_core.errors import CheckpointError, ConfigError, LightError, ModelError, PluginError, RequestError
from light_core.hookspecs import API_VERSION, hookimpl
from light_core.ops import Kernel, KernelRegistry, Machine, OpTable
from light_core.types import (
    ChatSpec,
    Family,
    FamilyRegistry,
    Hidden,
    KVGroup,
    KVLayout,
    KVPlane,
    KVView,
    Layer,
    Limits,
    MediaEncoder,
    MediaSpan,
    MediaTokens,
    ModelContext,
    Placement,
    PostLayer,
    PreLayer,
    Shard,
    Step,
    WeightPlan,
)
from light_sdk.weights import WeightPlanBuilder

__all__ = [
    "API_VERSION",
    "ChatSpec",
    "CheckpointError",
    "ConfigError",
    "Family",
    "FamilyRegistry",
    "Hidden",
    "KVGroup",
    "KVLayout",
    "KVPlane",
    "KVView",
    "Kernel",
    "KernelRegistry",
    "Layer",
    "LightError",
    "Limits",
    "Machine",
    "MediaEncoder",
    "MediaSpan",
    "MediaTokens",
    "ModelContext",
    "ModelError",
    "OpTable",
    "Placement",
    "PluginError",
    "PostLayer",
    "PreLayer",
    "RequestError",
    "Shard",
    "Step",
    "WeightPlan",
    "WeightPlanBuilder",
    "hookimpl",
]
