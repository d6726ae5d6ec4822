"""The table of options against the dataclasses behind it, and against the names that vLLM's users know."""

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from light_core.cli.main import command
from light_core.cli.settings import ENGINE_HELP, SECTIONS, engine_config, process_settings, server_settings
from light_core.config import EngineConfig
from light_core.errors import ConfigError
from light_core.media.settings import MediaSettings
from light_core.processes.settings import ProcessSettings
from light_core.server.settings import ServerSettings

INTERNAL = {"model", "async_planning"}
"""Of `EngineConfig`: the argument, and a switch for tests of the engine."""
OF_VLLM = [
    "--tokenizer",
    "--revision",
    "--dtype",
    "--load-format",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--gpu-memory-utilization",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--enforce-eager",
    "--seed",
    "--hf-overrides",
    "--skip-tokenizer-init",
    "--host",
    "--port",
    "--served-model-name",
    "--api-key",
    "--allowed-origins",
    "--chat-template",
    "--generation-config",
    "--max-logprobs",
    "--config",
]


def options(name: str) -> dict[str, click.Option]:
    return {str(param.name): param for param in command.commands[name].params if isinstance(param, click.Option)}


def values(*arguments: str) -> dict[str, Any]:
    with command.commands["serve"].make_context("serve", list(arguments)) as context:
        return context.params


def test_every_setting_of_the_engine_has_a_flag() -> None:
    assert set(ENGINE_HELP) == {field.name for field in dataclasses.fields(EngineConfig)} - INTERNAL


def test_every_option_of_serve_stands_in_a_section() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(set(options("serve")) - {"config"})


SETTINGS = (EngineConfig, ServerSettings, ProcessSettings, MediaSettings)


def test_options_of_serve_are_fields_with_the_same_default() -> None:
    fields = {field.name: field for kind in SETTINGS for field in dataclasses.fields(kind)}
    for name, option in options("serve").items():
        if name == "config":
            continue
        assert option.help and option.envvar == "LIGHT_" + option.opts[0].lstrip("-").replace("-", "_").upper()
        if option.default is not None and not option.multiple and fields[name].default is not dataclasses.MISSING:
            assert option.default == fields[name].default, name


@pytest.mark.parametrize("flag", OF_VLLM)
def test_flags_of_vllm_with_the_same_meaning(flag: str) -> None:
    assert any(flag in (*option.opts, *option.secondary_opts) for option in options("serve").values())


def test_settings_out_of_a_command_line(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    given = values(
        "org/model/", "--max-model-len", "64", "--api-key", "a", "--api-key", "b", "--port", "1", "--chat-template", str(template),
        "--drain-delay", "2", "--max-queued-requests", "3",
    )  # fmt: skip
    model = given.pop("model")
    assert engine_config(model, given) == EngineConfig(model=model, max_model_len=64)
    server = server_settings(model, given)
    assert (server.served_model_names, server.api_keys, server.chat_template) == (("org/model",), ("a", "b"), "{{ messages }}")
    assert (server.drain_delay_s, server.max_logprobs) == (2.0, ServerSettings(served_model_names=("m",)).max_logprobs)
    assert process_settings(given) == ProcessSettings(port=1, max_queued=3)


def test_shutdown_timeout_reaches_server_and_supervisor() -> None:
    given = values("m", "--shutdown-timeout", "4")
    assert server_settings("m", given).shutdown_timeout_s == process_settings(given).shutdown_timeout_s == 4.0


def test_what_cannot_hold_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="nowhere"):
        server_settings("m", values("m", "--chat-template", "/nowhere"))
    with pytest.raises(ConfigError, match="port"):
        process_settings(values("m", "--port", "70000"))
    with pytest.raises(ConfigError, match="max_num_seqs"):
        engine_config("m", values("m", "--max-num-seqs", "0"))
