"""What the README says is true: its plugin runs, its targets exist, its Python example works. And links of all pages lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from light_core import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    page.relative_to(ROOT)
    for page in (*ROOT.glob("*.md"), *(page for top in ("docs", "core", "sdk", "plugins", "tests") for page in (ROOT / top).rglob("*.md")))
)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CONFIG = {
    "architectures": ["TinyForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "num_heads": 2,
    "num_layers": 2,
    "max_position_embeddings": 128,
}


def anchors(page: Path) -> set[str]:
    """Where links may lead within a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", (ROOT / page).read_text())
    wrong = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_pages_have_links() -> None:
    assert len(PAGES) > 30 and README.count("](") > 15


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    named = {line.split()[0] for line in tree.strip().splitlines()}
    assert all((ROOT / name).exists() for name in named)


def test_the_offline_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in BLOCKS if "LLM(" in block)
    exec(compile(code.replace('LLM("demo")', 'LLM("demo", device="cpu", max_model_len=256)'), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("ROMEO:\n")


def tiny_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    size, weights = CONFIG["hidden_size"], {"embed": torch.randn(50, 32), "norm": torch.ones(32)}
    for i in range(2):
        weights |= {f"{i}.norm": torch.ones(size), f"{i}.mlp_norm": torch.ones(size), f"{i}.qkv": torch.randn(3 * size, size) / 4}
        weights |= {f"{i}.out": torch.randn(size, size) / 4, f"{i}.mlp.down": torch.randn(size, 2 * size) / 6}
        weights[f"{i}.mlp.gate_up"] = torch.randn(4 * size, size) / 4
    return weights


def tiny_reference(weights: dict[str, torch.Tensor], tokens: list[int]) -> int:
    """The README's model in plain float64 torch: the likeliest next token."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    norm = lambda x, scale: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale  # noqa: E731
    x = w["embed"][tokens]
    for i in range(2):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(0, 1) for part in (norm(x, w[f"{i}.norm"]) @ w[f"{i}.qkv"].T).chunk(3, -1))
        x = x + functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1) @ w[f"{i}.out"].T
        gate, up = (norm(x, w[f"{i}.mlp_norm"]) @ w[f"{i}.mlp.gate_up"].T).chunk(2, -1)
        x = x + (functional.silu(gate) * up) @ w[f"{i}.mlp.down"].T
    return int((norm(x[-1], w["norm"]) @ w["embed"].T).argmax())


def test_the_plugin_in_one_screen_serves(tmp_path: Path) -> None:
    plugin = tmp_path / "tiny.py"
    plugin.write_text(next(block for block in BLOCKS if "light_api" in block))
    weights = tiny_weights()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, tmp_path / "model.safetensors")
    options = {"device": "cpu", "dtype": "float32", "max_num_batched_tokens": 4, "max_num_seqs": 2, "skip_tokenizer_init": True}
    llm = LLM(str(tmp_path), model_plugin=str(plugin), **options)
    output = llm.generate(
        {"prompt_token_ids": [3, 14, 15, 9, 26, 5]}, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False
    )
    tokens = [3, 14, 15, 9, 26, 5]
    for _ in range(12):
        tokens.append(tiny_reference(weights, tokens))
    assert output[0].outputs[0].token_ids == tokens[6:]
