"""Options made from dataclasses: flags, environment, config file, and what goes before what."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from light_core.cli.options import SectionedCommand, dataclass_options, read_config_file, split
from light_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    max_len: int | None = None
    share: float = 0.5
    kind: str = "auto"
    caching: bool = True
    eager: bool = False
    names: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    secret: int = 7


HELP = {
    "max_len": "Length.",
    "share": "Share.",
    "kind": "Kind.",
    "caching": "Caching.",
    "eager": "Eager.",
    "names": "Names.",
    "overrides": "Overrides.",
}


def command() -> tuple[click.Command, list[dict[str, Any]]]:
    """A command with those options, and the list of what it was called with."""
    seen: list[dict[str, Any]] = []
    config = click.Option(["--config"], is_eager=True, expose_value=False, callback=read_config_file)
    params = [click.Argument(["model"]), *dataclass_options(Settings, HELP, {"kind": ("auto", "cpu")}), config]
    return SectionedCommand(
        "run", params=params, callback=lambda **values: seen.append(values), sections={"Sizes": ("max_len", "share")}
    ), seen


def parsed(*arguments: str, **environment: str) -> Settings:
    made, seen = command()
    result = CliRunner().invoke(made, ["m", *arguments], env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Settings(**split(seen[0], Settings))


def test_nothing_given_is_the_dataclass_default() -> None:
    assert parsed() == Settings()


def test_every_kind_of_field() -> None:
    given = parsed(
        "--max-len", "5", "--share", "0.25", "--kind", "cpu", "--no-caching", "--eager", "--names", "a", "--names", "b",
        "--overrides", '{"rope": {"factor": 2}}',
    )  # fmt: skip
    wanted = Settings(max_len=5, share=0.25, kind="cpu", caching=False, eager=True, names=("a", "b"), overrides={"rope": {"factor": 2}})
    assert given == wanted


def test_a_field_without_an_explanation_is_no_option() -> None:
    assert CliRunner().invoke(command()[0], ["m", "--secret", "1"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-len", "long"], "not a valid integer"),
        (["--kind", "tpu"], "'auto', 'cpu'"),
        (["--overrides", "{"], "is not JSON"),
        (["--overrides", "[1]"], "is not a JSON object"),
        (["--max-length", "5"], "Did you mean '--max-len'"),
    ],
)
def test_wrong_values_are_told(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(command()[0], ["m", *arguments])
    assert result.exit_code == 2 and words in result.output


def test_environment_twins() -> None:
    given = parsed(LIGHT_MAX_LEN="9", LIGHT_CACHING="0", LIGHT_NAMES="a b", LIGHT_OVERRIDES='{"x": 1}')
    assert given == Settings(max_len=9, caching=False, names=("a", "b"), overrides={"x": 1})


def write(folder: Path, content: str) -> str:
    path = folder / "config.yaml"
    path.write_text(content)
    return str(path)


def test_config_file(tmp_path: Path) -> None:
    path = write(tmp_path, "max-len: 3\nshare: 0.1\neager: true\nnames: one\noverrides: {rope: {factor: 2}}\n")
    wanted = Settings(max_len=3, share=0.1, eager=True, names=("one",), overrides={"rope": {"factor": 2}})
    assert parsed("--config", path) == wanted
    assert parsed("--config", write(tmp_path, "max_len: 3\nnames: [one, two]\n")) == Settings(max_len=3, names=("one", "two"))


def test_command_line_before_environment_before_file(tmp_path: Path) -> None:
    path = write(tmp_path, "max-len: 1\nshare: 0.1\nkind: cpu\n")
    given = parsed("--config", path, "--max-len", "3", LIGHT_MAX_LEN="2", LIGHT_SHARE="0.2")
    assert (given.max_len, given.share, given.kind) == (3, 0.2, "cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max-length: 3", "did you mean 'max-len'"),
        ("zzz: 3", "unknown setting 'zzz'"),
        ("- a\n- b", "it holds a list"),
        ("a: [", "cannot be read"),
        ("config: other.yaml", "unknown setting 'config'"),
    ],
)
def test_a_wrong_config_file(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("--config", write(tmp_path, content))
    assert words in caught.value.block() and caught.value.remedy


def test_a_config_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        parsed("--config", "/nowhere/config.yaml")


def test_a_wrong_value_in_a_config_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(command()[0], ["m", "--config", write(tmp_path, "max-len: long")])
    assert result.exit_code == 2 and "--max-len" in result.output


def test_help_has_sections() -> None:
    text = CliRunner().invoke(command()[0], ["--help"]).output
    sizes, other = text.index("Sizes:"), text.index("Other:")
    assert sizes < text.index("--max-len") < text.index("--share") < other < text.index("--kind")
    assert "LIGHT_MAX_MODEL_LEN" in text, "the rule for the environment is told"


def test_split_takes_its_own_fields_alone() -> None:
    values = {"max_len": None, "share": 0.1, "names": (), "port": 80, "overrides": json.loads("{}")}
    assert split(values, Settings) == {"share": 0.1, "overrides": {}}
    assert {field.name for field in dataclasses.fields(Settings)}.isdisjoint({"port"})
