"""transformers' configuration classes, without the half of transformers and of torch that they would bring along.

The module that validates configurations imports the table of activation functions, to know their names. That one imports
transformers' generation code, which imports torch's compiler and torch.distributed: more than a thousand modules, a second
of the start of every process that reads a configuration, and more from a cold disk. Here the table is imported when
somebody looks something up in it. Caller: `model_files.py`.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

__all__ = ["config_class"]

ACTIVATIONS, VALIDATORS = "transformers.activations", "transformers.utils.type_validators"


def config_class(model_type: str) -> Any:
    """The class for `model_type`; for a type that transformers does not know, one of that type with no entries of its own."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _import_validators()
    # Not .get(): this mapping loads its entries in __getitem__ alone.
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    # transformers warns of a configuration whose type is not its class's.
    return type("UnknownConfig", (PretrainedConfig,), {"model_type": model_type})


def _import_validators() -> None:
    """Imports the validators with a table of activations that is not there yet. Where this version of transformers has them
    elsewhere, or needs more of them, they are imported as it sees fit."""
    if ACTIVATIONS in sys.modules or VALIDATORS in sys.modules:
        return
    stand_in = ModuleType(ACTIVATIONS)
    vars(stand_in)["ACT2FN"] = _Activations()
    sys.modules[ACTIVATIONS] = stand_in
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module(VALIDATORS)
    finally:
        del sys.modules[ACTIVATIONS]


class _Activations(Mapping[str, Any]):
    """transformers' table of activation functions, imported by whoever looks into it."""

    def _table(self) -> Mapping[str, Any]:
        table: Mapping[str, Any] = importlib.import_module(ACTIVATIONS).ACT2FN
        return table

    def __getitem__(self, name: str) -> Any:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())
