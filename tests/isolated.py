"""Installs each plugin alone in a clean environment and serves with it.

Run by `make isolated`. One environment holds torch and the third-party packages and is kept between runs; for each
plugin the wheels of core, sdk and that plugin alone are installed in it, a model is served, a completion is asked for,
and the wheels are removed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-isolated"
PYTHON = ENVIRONMENT / "bin" / "python"
PLUGINS = ("llama", "bloom")
START_S = 120


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def pip(*arguments: object) -> None:
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt", *arguments)


def build_wheels(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    for package in ("core", "sdk", *(f"plugins/{name}" for name in PLUGINS)):
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--wheel-dir",
            folder,
            f"./{package}",
        )
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def create_environment(wheels: dict[str, pathlib.Path]) -> None:
    if not PYTHON.exists():
        run(sys.executable, "-m", "venv", ENVIRONMENT)
    pip("torch")
    pip(wheels["light_core"], wheels["light_sdk"])


def tiny_bloom(folder: pathlib.Path) -> str:
    """A random BLOOM with a word-level tokenizer, written by the packages of this environment."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, seq_length=256)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return str(folder)


def serve_and_ask(model: str, plugin: str) -> None:
    """Starts `light serve`, asks for a completion over HTTP and stops it; raises if any of it fails."""
    command = [str(ENVIRONMENT / "bin" / "light"), "serve", model, "--model-plugin", plugin, "--port", "0", "--drain-delay", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tempfile.gettempdir(), env=environment)
        try:
            url = wait_for_url(server, log)
            body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            answer = json.load(urllib.request.urlopen(request, timeout=60))
            assert answer["usage"]["completion_tokens"] == 8, answer
            server.terminate()
            assert server.wait(30) == 0, f"exit code {server.returncode}"
        except BaseException:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise
        finally:
            server.kill()
    print(f"light-plugin-{plugin}: installed alone, served {pathlib.Path(model).name}")


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
    with tempfile.TemporaryDirectory() as scratch:
        wheels = build_wheels(pathlib.Path(scratch))
        create_environment(wheels)
        models = {"llama": "demo", "bloom": tiny_bloom(pathlib.Path(scratch) / "tiny-bloom")}
        for name in PLUGINS:
            others = [f"light-plugin-{other}" for other in PLUGINS if other != name]
            run(PYTHON, "-m", "pip", "uninstall", "--quiet", "--disable-pip-version-check", "--yes", *others)
            ours = [wheels[key] for key in ("light_core", "light_sdk", f"light_plugin_{name}")]
            pip("--force-reinstall", "--no-deps", *ours)
            serve_and_ask(models[name], name)


if __name__ == "__main__":
    main()
