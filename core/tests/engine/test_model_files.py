"""Finding a model and reading its configuration."""

import json
import logging
from pathlib import Path

import pytest

from light_core.engine.model_files import max_positions, read_config, resolve_dtype, resolve_folder, resolve_max_model_len
from light_core.errors import ConfigError, ModelError


def folder(path: Path, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}))
    return path


def test_local_folder_and_bundled_name(tmp_path: Path) -> None:
    made = folder(tmp_path / "model")
    assert resolve_folder(str(made), None, {}) == made
    assert resolve_folder("demo", None, {"demo": made}) == made


@pytest.mark.parametrize("name", ["demoo", "./nothing", "/nowhere/at/all", "a/b/c"])
def test_no_such_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_folder(name, None, {"demo": tmp_path})
    assert name in caught.value.error and "demo" in caught.value.cause


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_folder(str(tmp_path), None, {})


def test_offline_hub_id_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        resolve_folder("some-org/some-model", None, {})
    assert "HF_HUB_OFFLINE" in caught.value.block()


def test_auto_map_is_never_followed(tmp_path: Path) -> None:
    made = folder(tmp_path / "model", model_type="mine", auto_map={"AutoConfig": "evil.Config"}, hidden_size=7)
    (made / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    files = read_config(made, {})
    assert files.config.hidden_size == 7 and "auto_map" not in files.raw
    assert not (tmp_path / "canary").exists()


def test_overrides_replace_entries(tmp_path: Path) -> None:
    files = read_config(folder(tmp_path / "model", max_position_embeddings=64), {"max_position_embeddings": 128})
    assert files.config.max_position_embeddings == 128 and max_positions(files) == 128


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "llama", "num_attention_heads": "three"}'])
def test_broken_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError):
        read_config(tmp_path, {})


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 100),
        ({"type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "dynamic", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 50}, 100),
    ],
)
def test_positions_follow_the_rope_scaling(tmp_path: Path, rope: dict[str, object] | None, expected: int) -> None:
    files = read_config(folder(tmp_path / "model", max_position_embeddings=100, rope_scaling=rope), {})
    assert max_positions(files) == expected
    assert resolve_max_model_len(files, None) == expected
    with pytest.raises(ConfigError, match=str(expected + 1)):
        resolve_max_model_len(files, expected + 1)


def test_dtype(tmp_path: Path) -> None:
    files = read_config(folder(tmp_path / "model", torch_dtype="float16"), {})
    assert resolve_dtype(files, "auto", "cuda:0") == "float16"
    assert resolve_dtype(files, "float32", "cuda:0") == "float32"
    assert resolve_dtype(files, "auto", "cpu") in ("float32", "bfloat16")


def response(kind: type[Exception], status: int) -> Exception:
    import httpx

    return kind("no\nsecond line", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid")))  # type: ignore[call-arg]


def hub_errors() -> list[tuple[Exception, str]]:
    import httpx
    from huggingface_hub import errors as hub

    return [
        (response(hub.GatedRepoError, 403), "gated"),
        (response(hub.RepositoryNotFoundError, 404), "does not exist, or is private"),
        (response(hub.RevisionNotFoundError, 404), "no revision 'v9'"),
        (response(hub.HfHubHTTPError, 500), "HfHubHTTPError: no second line"),
        (hub.LocalEntryNotFoundError("not here"), "not in the cache"),
        (httpx.ConnectError("refused"), "ConnectError: refused"),
        (httpx.ReadTimeout(""), "ReadTimeout"),
        (OSError(28, "No space left on device"), "No space left"),
        (OSError(), "OSError"),
    ]


@pytest.mark.parametrize(("error", "words"), hub_errors(), ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")
def test_what_the_hub_refuses_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        resolve_folder("some-org/some-model", "v9", {})
    block = caught.value.block()
    assert words in block and "some-org/some-model" in block and "\ntry:" in block


def test_what_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **options: asked.update(options) or str(tmp_path))
    assert resolve_folder("some-org/some-model", "v9", {}) == tmp_path
    assert asked["revision"] == "v9" and "*.safetensors" in str(asked["allow_patterns"]) and ".bin" not in str(asked["allow_patterns"])
    assert "consolidated*" in str(asked["ignore_patterns"])
    resolve_folder("some-org/some-model", None, {}, weights=False)
    assert "safetensors" not in str(asked["allow_patterns"])


@pytest.mark.parametrize("named", ["LlamaForCausalLM", 5, [5], {"a": 1}])
def test_architectures_are_a_list_of_names(tmp_path: Path, named: object) -> None:
    with pytest.raises(ModelError, match="architectures"):
        read_config(folder(tmp_path / "model", architectures=named), {})


def test_a_model_type_that_transformers_does_not_know_is_no_cause_for_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    files = read_config(folder(tmp_path / "model", model_type="Yi", hidden_size=7), {})
    assert (files.config.model_type, files.config.hidden_size) == ("Yi", 7)
    assert not caplog.records


def test_the_whole_reason_of_a_bad_value_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(folder(tmp_path / "model"), {"hidden_size": "seven"})
    assert "hidden_size" in caught.value.cause and "'seven'" in caught.value.cause
