"""Installs each plugin alone in a clean environment and serves with it.

Run by `make isolated`; `python tests/isolated.py llama bloom` takes these plugins alone. One environment holds torch and
the third-party packages and is kept between runs; for each plugin the wheels of core, sdk and that plugin alone (with the
plugins that it requires) are installed in it, a model is served, a completion is asked for, of one that sees an answer about
a picture too, and the wheels are removed.

Every folder of plugins/ is tested. The model is one that the plugin ships, one that a function here writes, or that of the
plugin's tests/tiny/config.json, with random weights.
"""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-isolated"
PYTHON = ENVIRONMENT / "bin" / "python"
PLUGINS = tuple(sorted(manifest.parent.name for manifest in (ROOT / "plugins").glob("*/pyproject.toml")))
SEEING = {"llava": {"<image>": 127}, "qwen_vl": {"<|vision_start|>": 124, "<|vision_end|>": 125, "<|image_pad|>": 127}}
"""Plugins of models that see, and the tokens around pictures that a tokenizer of theirs has."""
PICTURE_SIZE, NUM_PICTURE_TOKENS = 56, 4
START_S, NUM_OUTPUT = 900, 8


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def pip(*arguments: object) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-compile", "--constraint", "constraints.txt")
    run(PYTHON, "-m", "pip", "install", *options, *arguments)


def build_wheels(plugins: set[str], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    def build(package: str) -> None:
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
        run(sys.executable, "-m", "pip", "wheel", *options, f"./{package}")

    packages = ["core", "sdk", *(f"plugins/{name}" for name in sorted(plugins))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, packages))
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def create_environment(wheels: dict[str, pathlib.Path]) -> None:
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", ENVIRONMENT)
    pip("torch")
    pip(wheels["light_core"], wheels["light_sdk"])
    if sys.dont_write_bytecode:  # else what is imported first is compiled once
        subprocess.run([PYTHON, "-m", "compileall", "-qq", "-j", "0", ENVIRONMENT / "lib"], check=False)


def tiny_bloom(folder: pathlib.Path) -> str:
    """A random BLOOM with a word-level tokenizer, written by the packages of this environment."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, seq_length=256)).save_pretrained(folder)
    return write_tokenizer(folder)


def tiny_qwen(folder: pathlib.Path) -> str:
    """As `tiny_bloom`, a random Qwen3."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)).save_pretrained(folder)
    return write_tokenizer(folder)


def tiny_llava(folder: pathlib.Path) -> str:
    """As `tiny_bloom`, a random LLaVA over a Llama."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=128, max_position_embeddings=256)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=127)).save_pretrained(folder)
    return write_tokenizer(folder, SEEING["llava"])


def configured(plugin: str, folder: pathlib.Path) -> str:
    """As `tiny_bloom`, without weights: the configuration that `plugin` has for its tests.

    Raises:
        FileNotFoundError: it has none.
    """
    folder.mkdir()
    shutil.copy(ROOT / "plugins" / plugin / "tests" / "tiny" / "config.json", folder)
    return write_tokenizer(folder, SEEING.get(plugin, {}))


def required_plugins(plugin: str) -> tuple[str, ...]:
    """Plugins that `plugin` requires as distributions, because they serve its text models."""
    project = tomllib.loads((ROOT / "plugins" / plugin / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].replace("_", "-") for requirement in project["dependencies"]}
    return tuple(other for other in PLUGINS if f"light-plugin-{other.replace('_', '-')}" in names)


def write_tokenizer(folder: pathlib.Path, special: "dict[str, int] | None" = None) -> str:
    """A tokenizer of 128 words, of which some are special tokens; returns the folder."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = {token: word for word, token in (special or {}).items()}
    words = Tokenizer(models.WordLevel({named.get(i, f"w{i}"): i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in named.values()])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return str(folder)


def serve_and_ask(model: str, plugin: str, *options: str) -> None:
    """Starts `light serve`, asks it over HTTP and stops it; raises if any of it fails."""
    command = [str(ENVIRONMENT / "bin" / "light"), "serve", model, "--model-plugin", plugin, "--port", "0", "--drain-delay", "0"]
    command += options
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tempfile.gettempdir(), env=environment)
        try:
            url = wait_for_url(server, log)
            ask(f"{url}/v1/completions", model=model, prompt=[5, 6, 7])
            if plugin in SEEING:
                text, image = {"type": "text", "text": "w5"}, {"type": "image_url", "image_url": {"url": picture_url()}}
                blind, seen = (
                    ask(f"{url}/v1/chat/completions", model=model, messages=[{"role": "user", "content": parts}])
                    for parts in ([text], [image, text])
                )
                assert seen - blind >= NUM_PICTURE_TOKENS, f"{seen} tokens with a picture, {blind} without"
            server.terminate()
            assert server.wait(START_S) == 0, f"exit code {server.returncode}"
        except BaseException:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise
        finally:
            server.kill()
    pictures = " with a picture" if plugin in SEEING else ""
    print(f"light-plugin-{plugin}: installed alone, served {pathlib.Path(model).name}{pictures}")


def ask(url: str, **body: object) -> int:
    """Asks for `NUM_OUTPUT` tokens; returns how many the prompt had."""
    settings = {"max_tokens": NUM_OUTPUT, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url, json.dumps(body | settings).encode(), {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request, timeout=START_S))
    assert answer["usage"]["completion_tokens"] == NUM_OUTPUT, answer
    return int(answer["usage"]["prompt_tokens"])


def picture_url() -> str:
    """A small picture, as a data: URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize((PICTURE_SIZE, PICTURE_SIZE)).convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def wait_for_url(server: subprocess.Popen[bytes], log: "object") -> str:
    """The address in the "ready" line of the log."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        log.seek(0)
        for line in log.read().splitlines():
            if "ready in" in line and "http://" in line:
                return "http://" + line.partition("http://")[2].split("/")[0].split()[0].rstrip(",")
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode} before it was ready")
        time.sleep(0.2)
    raise TimeoutError("the server was not ready in time")


def main() -> None:
    chosen = sys.argv[1:] or PLUGINS
    if unknown := sorted({*chosen} - {*PLUGINS}):
        sys.exit(f"error: there is no plugins/{unknown[0]}; there are: {', '.join(PLUGINS)}")
    with tempfile.TemporaryDirectory() as scratch:
        wheels = build_wheels({one for name in chosen for one in (name, *required_plugins(name))}, pathlib.Path(scratch))
        create_environment(wheels)
        makers = {"llama": lambda folder: "demo", "bloom": tiny_bloom, "qwen": tiny_qwen, "llava": tiny_llava}
        for name in chosen:
            folder = pathlib.Path(scratch) / f"tiny-{name}"
            model = makers[name](folder) if name in makers else configured(name, folder)
            kept = (name, *required_plugins(name))
            others = [f"light-plugin-{other}" for other in PLUGINS if other not in kept]
            run(PYTHON, "-m", "pip", "uninstall", "--quiet", "--disable-pip-version-check", "--yes", *others)
            ours = [wheels[key] for key in ("light_core", "light_sdk", *(f"light_plugin_{one}" for one in kept))]
            pip("--force-reinstall", "--no-deps", *ours)
            pip(*ours)  # what they require of others
            serve_and_ask(model, name, *(() if name in makers else ("--load-format", "dummy")))


if __name__ == "__main__":
    main()
