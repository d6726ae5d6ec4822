"""Command-line options made from the configuration dataclasses, each with an environment twin and a key in a config file.

One table says how a setting is spelled and explained; types and defaults are the dataclass's own, so that the two
cannot drift.
"""

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from light_core.errors import ConfigError

__all__ = ["JSON", "SectionedCommand", "dataclass_options", "read_config_file", "split"]

TWINS = (
    "Every option has a twin in the environment (--max-model-len is LIGHT_MAX_MODEL_LEN) and may stand in the file of "
    "--config. The command line goes before the environment, the environment before the file."
)


class JSON(click.ParamType[Any]):
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a dict; anything else is a usage error."""
        if isinstance(value, Mapping):
            return dict(value)
        try:
            parsed = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is not a JSON object", param, ctx)
        return parsed


class SectionedCommand(click.Command):
    """A command whose help has its options under headings.

    Args:
        sections: heading to option names; what is in none of them comes last, as "Other".
    """

    def __init__(self, name: str, *, sections: Mapping[str, Sequence[str]], **settings: Any) -> None:
        super().__init__(name, epilog=TWINS, **settings)
        self._sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one block a section; a section without options is left out."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {option.name: record for option in options if (record := option.get_help_record(ctx)) is not None}
        for heading, names in self._sections.items():
            self._write(formatter, heading, [records.pop(name) for name in names if name in records])
        self._write(formatter, "Other", list(records.values()))

    @staticmethod
    def _write(formatter: click.HelpFormatter, heading: str, records: list[tuple[str, str]]) -> None:
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def dataclass_options(
    kind: type, helps: Mapping[str, str], choices: Mapping[str, Iterable[str]] = types.MappingProxyType({})
) -> list[click.Option]:
    """An option for each field of dataclass `kind` that `helps` explains: `max_model_len` becomes `--max-model-len`
    and `LIGHT_MAX_MODEL_LEN`."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    return [_option(fields[name], hints[name], text, choices.get(name)) for name, text in helps.items()]


def _option(field: "dataclasses.Field[Any]", hint: Any, text: str, choices: Iterable[str] | None) -> click.Option:
    flag, env = "--" + field.name.replace("_", "-"), "LIGHT_" + field.name.upper()
    kind, multiple = _param_type(hint)
    default = _default(field)
    settings: dict[str, Any] = {"envvar": env, "help": text}
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", field.name], default=default, show_default="on" if default else False, **settings)
    if multiple:
        return click.Option([flag, field.name], multiple=True, type=kind, default=None, **settings)
    if choices is not None:
        kind = click.Choice(list(choices))
    return click.Option([flag, field.name], type=kind, default=default, show_default=default not in (None, {}), **settings)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None


def _param_type(hint: Any) -> tuple[Any, bool]:
    """click's type for a field's annotation, and whether the option may be repeated."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _param_type(next(argument for argument in arguments if argument is not type(None)))
    if origin in (tuple, list):
        return _param_type(arguments[0])[0], True
    if origin is not None and issubclass(origin, Mapping):
        return JSON(), False
    return hint, False


def split(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Those of `values` that are fields of dataclass `kind` and were given (None and () mean the default)."""
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in values.items() if name in names and value is not None and value != ()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def read_config_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Callback of `--config`: a YAML mapping of option names (with - or _) that become defaults.

    Raises:
        ConfigError: the file cannot be read, or names an option that there is not.
    """
    del param
    if value is None:
        return
    import yaml

    try:
        content = yaml.safe_load(Path(value).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {value} cannot be read", str(error), "give a YAML file of settings") from error
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"--config {value} is not a mapping", f"it holds a {type(content).__name__}", "write lines like `max-model-len: 4096`"
        )
    known = _settings(ctx.command)
    defaults = {}
    for key, setting in content.items():
        spelling = str(key).replace("_", "-")
        if spelling not in known:
            near = difflib.get_close_matches(spelling, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"see `{ctx.command_path} --help`"
            raise ConfigError(f"--config {value}: unknown setting {key!r}", "no option has that name", hint)
        option = known[spelling]
        repeated = option.multiple and not isinstance(setting, (list, tuple))
        defaults[str(option.name)] = [setting] if repeated else setting
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _settings(command: click.Command) -> dict[str, click.Parameter]:
    """What a config file may set: options by their flags without the dashes in front, arguments by their names."""
    known: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if parameter.expose_value and parameter.name:
            known |= dict.fromkeys((flag.lstrip("-").replace("_", "-") for flag in parameter.opts if len(flag) > 2), parameter)
    return known
