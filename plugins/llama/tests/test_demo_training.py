"""The demo's training script, run in seconds on a made-up play."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "demo" / "train.py"

HEADER = """\
\tTHE LOST LANTERN


\tDRAMATIS PERSONAE


ANNA\ta lamplighter. (ANNA:)

BEN\t|
\t|  watchmen.
TOM\t|


SCENE\tA harbour, and
\tthe hills above it.


"""

# Every form that the real files have: a name over two lines, a speech of two speakers in a brace,
# a direction over two lines, an indented shared line of verse, prose.
OPENING = """\
\tTHE LOST LANTERN


ACT I



SCENE I\tThe harbour.
\tNight.


\t[Enter ANNA, with a
\tlantern]

ANNA\tWho walks the quay so late, so cold, so far?
\tSpeak, or I bid the watch to fetch thee hence.

First Watchman\t     A friend; put up
\tthe light, good anna, and be still.

OLD BEN
OF THE TOWER\tThe tide is out.

BEN\t|
\t| Good night.
TOM\t|

\t[Exeunt]
"""


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("light_llama_demo_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one play of six scenes, long enough for a held-out passage."""
    rng = random.Random(0)
    words = ["lamp", "sea", "night", "stone", "bell", "love", "crown", "ship", "wind", "gold", "king", "thy", "the", "of", "and"]
    scenes = [HEADER, OPENING]
    for number in range(6):
        scenes.append(f"\tTHE LOST LANTERN\n\n\nACT II\n\n\nSCENE {'I' * (number + 1)}\tA hill.\n\n\n\t[Enter ANNA and TOM]\n")
        for turn in range(40):
            lines = [" ".join(rng.choices(words, k=8)).capitalize() + "," for _ in range(rng.randint(3, 6))]
            scenes.append(f"{('ANNA', 'TOM')[turn % 2]}\t" + "\n\t".join(lines) + "\n")
        scenes.append("\t[Exeunt]\n\n\n")
    folder = tmp_path_factory.mktemp("texts")
    (folder / "lantern.txt").write_text("\n".join(scenes), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def demo(play: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder that a quick run writes, and its summary."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, SCRIPT, "--quick", "--data", play, "--out", out, "--device", "cpu"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return out, json.loads(result.stdout)


def test_scenes_are_cleaned(train: ModuleType, play: Path) -> None:
    scenes = train.read_scenes(play / "lantern.txt")
    assert len(scenes) == 7
    assert scenes[0] == [
        "THE LOST LANTERN",
        "ACT I",
        "SCENE I. The harbour. Night.",
        "[Enter ANNA, with a lantern]",
        "ANNA:\nWho walks the quay so late, so cold, so far?\nSpeak, or I bid the watch to fetch thee hence.",
        "FIRST WATCHMAN:\nA friend; put up\nthe light, good anna, and be still.",
        "OLD BEN OF THE TOWER:\nThe tide is out.",
        "[Exeunt]",
    ]


def test_held_out_passages_are_not_trained_on(train: ModuleType, play: Path) -> None:
    scenes = train.read_scenes(play / "lantern.txt")
    documents, held_out = train.split_documents([scenes])
    assert len(held_out) == 1
    # The made-up speeches are all different; what repeats are headings and directions.
    speeches = [{text for document in part for text in document if ":\n" in text} for part in (documents, held_out)]
    assert not speeches[0] & speeches[1]
    assert sum(map(len, documents + held_out)) == sum(map(len, scenes))


def test_conversations_reply_in_verse_and_repeat_nothing(train: ModuleType, play: Path) -> None:
    scenes = train.read_scenes(play / "lantern.txt")
    conversations = train.create_conversations(scenes, random.Random(0))
    assert any(chat[0]["role"] == "system" for chat in conversations)
    assert any(len(chat) > 3 for chat in conversations)
    for chat in conversations:
        turns = [message for message in chat if message["role"] != "system"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert len({turn["content"] for turn in turns}) == len(turns)
        assert all(turn["content"].count("\n") >= 2 for turn in turns if turn["role"] == "assistant")


def test_summary(demo: tuple[Path, dict]) -> None:
    out, summary = demo
    assert summary["last_loss"] < summary["first_loss"] - 1
    assert summary["held_out_loss"] < summary["first_loss"] - 1
    assert summary["held_out_perplexity"] == pytest.approx(math.exp(summary["held_out_loss"]), rel=1e-4)
    assert 0 < summary["held_out_bits_per_byte"] < 8
    assert summary["folder_bytes"] == sum(path.stat().st_size for path in out.iterdir())


def test_folder_loads_in_transformers(demo: tuple[Path, dict]) -> None:
    out, summary = demo
    names = ["chat_template.jinja", "config.json", "generation_config.json"]
    names += ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names

    config = AutoConfig.from_pretrained(out)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == config.vocab_size
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == summary["parameters"]
    # Both ends stop a generation: of a scene, and of a speech in a chat.
    ends = [tokenizer.convert_ids_to_tokens(id_) for id_ in model.generation_config.eos_token_id]
    assert ends == ["<|eos|>", "<|end|>"]


@pytest.mark.parametrize(
    "text",
    [
        "ANNA:\nWho's there?\n\n[Exeunt]\n",
        "  leading, doubled  and trailing spaces ",
        "\n\n\nlines\n \n\tand tabs\r\n",
        "Ünïcödé, 汉字, 😀, 3.14",
        "",
    ],
)
def test_tokenizer_is_lossless(demo: tuple[Path, dict], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo[0])
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert ids == Tokenizer.from_file(str(demo[0] / "tokenizer.json")).encode(text).ids


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [{"role": "user", "content": " Who's there?\n"}],
            "<|bos|>GUEST:\nWho's there?<|end|>\n\nBARD:\n",
        ),
        (
            [{"role": "system", "content": "A heath."}, {"role": "user", "content": "Hail!"}],
            "<|bos|>[A heath.]\n\nGUEST:\nHail!<|end|>\n\nBARD:\n",
        ),
        (
            [
                {"role": "user", "content": "Hail!"},
                {"role": "assistant", "content": "Good morrow,\nsir."},
                {"role": "user", "content": "Adieu."},
            ],
            "<|bos|>GUEST:\nHail!<|end|>\n\nBARD:\nGood morrow,\nsir.<|end|>\n\nGUEST:\nAdieu.<|end|>\n\nBARD:\n",
        ),
    ],
)
def test_chat_template(demo: tuple[Path, dict], messages: list[dict[str, str]], expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo[0])
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    without_prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert without_prompt == expected.removesuffix("\n\nBARD:\n")


def test_chat_template_refuses_unknown_roles(demo: tuple[Path, dict]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo[0])
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}], tokenize=False)
