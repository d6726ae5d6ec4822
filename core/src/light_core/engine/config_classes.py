"""transformers' configuration classes, without the half of transformers and of torch that they would bring along.

A configuration is a table of values, but the import of its class is not one. The module that validates configurations
imports that of videos, for an annotation, hence torchvision where it is installed, hence torch's compiler; the table of
activation functions, to know their names, hence transformers' generation code; and the decorator that writes a class's
docstring imports every model's name and that code again, with scikit-learn where it is installed. Together more than 5 s of
the 20 that a process with all of them took to start. None of it is needed to read a configuration, and a torchvision that
does not fit torch must not keep a text model from being served. Here each is stood in for while the class is imported, and
imported for real by whoever asks for it later. Caller: `model_files.py`.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from light_core.engine.stand_ins import standing_in

__all__ = ["config_class"]


def config_class(model_type: str) -> Any:
    """The class for `model_type`; for a type that transformers does not know, one of that type with no entries of its own."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _import_validators()
    # Not .get(): this mapping loads its entries in __getitem__ alone.
    if model_type in CONFIG_MAPPING:
        with _undocumented():
            return CONFIG_MAPPING[model_type]
    # transformers warns of a configuration whose type is not its class's.
    return type("UnknownConfig", (PretrainedConfig,), {"model_type": model_type})


def _import_validators() -> None:
    """Imports the validators with what they look up while they validate. Where this version of transformers has none, they are
    not needed."""
    with (
        contextlib.suppress(ImportError),
        standing_in("transformers.activations", {"ACT2FN": _Activations()}),
        standing_in("transformers.video_utils", {"VideoMetadataType": Any}),
        standing_in("transformers.image_utils", {"PILImageResampling": _resampling()}),
    ):
        importlib.import_module("transformers.utils.type_validators")


@contextlib.contextmanager
def _undocumented() -> Iterator[None]:
    """Classes that are imported in the block keep the docstrings of their source."""
    utils: Any = importlib.import_module("transformers.utils")
    document = getattr(utils, "auto_docstring", None)
    if document is None:
        yield
        return
    utils.auto_docstring = _as_written
    try:
        yield
    finally:
        utils.auto_docstring = document


def _as_written(documented: Any = None, **_: Any) -> Any:
    """The decorator that writes docstrings, with options or without, writing none."""
    return _as_written if documented is None else documented


def _resampling() -> Any:
    try:
        from PIL.Image import Resampling
    except ImportError:
        return None
    return Resampling


class _Activations(Mapping[str, Any]):
    """transformers' table of activation functions, imported by whoever looks into it."""

    def _table(self) -> Mapping[str, Any]:
        table: Mapping[str, Any] = importlib.import_module("transformers.activations").ACT2FN
        return table

    def __getitem__(self, name: str) -> Any:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())
