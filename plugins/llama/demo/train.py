"""Trains Light's demo model: a Llama of 7 million parameters that writes like Shakespeare.

    python train.py --data FOLDER_OF_TXT --out FOLDER

What it writes is an ordinary Hugging Face folder, so the demo takes the same path through Light as
any other Llama; grouped-query attention and tied embeddings are there to be exercised. It is not a
training framework, and nothing imports it. Progress and samples go to stderr, a JSON summary with
the figures to stdout.

The text. The files hold one play or poem each, in scenes; of each play the list of persons is left
out. A speech becomes `HAMLET:` on a line of its own and the lines below it, a stage direction
`[Exeunt]`, and a blank line parts the paragraphs. A document is `<|bos|>`, a scene (or a sonnet, or
a long poem), `<|eos|>`.

The held-out split. Each scene is cut, between paragraphs, into passages of 4,000 characters or a
little more, numbered through its file from 0; the passages 2, 30, 58 ... of every file are held
out, which is about 5 % of the text. What stands before and after a held-out passage are two
documents to the training. The tokenizer does not see the held-out text either.

Chat. The template renders the user's message as a speech of GUEST and leaves BARD to speak next. A
share of the training rows are pairs of speeches from the plays, rendered by that same template, so
that a reply is a speech in verse and ends in `<|end|>`. Plain text never holds that token: a
completion runs over many speeches, until `<|eos|>` at the end of a scene.
"""

import argparse
import copy
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Token ids are the positions in this list.
BOS, EOS, PAD, END = SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"]

# A word takes the space or the apostrophe before it ("kill'd" is "kill" and "'d"). A run of line
# ends is a piece of its own, so that a text has the same tokens alone and inside a longer one.
PIECES = r" ?'?\p{L}+|\n+| ?[^\s\p{L}]+|[^\S\n]+"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[' + message.content | trim + ']' }}
    {%- elif message.role == 'user' %}
        {{- 'GUEST:\\n' + message.content | trim + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- 'BARD:\\n' + message.content | trim + '<|end|>' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role + ': known are system, user, assistant') }}
    {%- endif %}
    {%- if not loop.last or add_generation_prompt %}
        {{- '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'BARD:\\n' }}
{%- endif %}
"""

PASSAGE_CHARS = 4000
HELD_OUT_EVERY, HELD_OUT_FIRST = 28, 2
CHAT_PROMPT = [{"role": "user", "content": "Good morrow! What is love?"}]


@dataclass(frozen=True)
class Recipe:
    """The shape of the model and how it is trained; `replace` makes variants."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    max_len: int = 2048
    # The steps take turns through these row lengths; each holds `step_tokens` in all.
    row_lens: tuple[int, ...] = (512, 512, 512, 2048)
    step_tokens: int = 32768
    steps: int = 3400
    warmup: float = 0.04  # share of the steps
    evaluations: int = 30
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    chat_share: float = 0.2


QUICK = Recipe(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    row_lens=(64, 256),
    step_tokens=1024,
    steps=60,
    evaluations=3,
    learning_rate=1e-2,
)


# The text. A paragraph is a string without blank lines, a document a list of paragraphs.


def read_scenes(path: Path) -> list[list[str]]:
    """One file's scenes (of a play) or poems, in order, each as its paragraphs."""
    text = path.read_text(encoding="utf-8")
    title = text.strip().split("\n")[0].strip()
    # The list of persons ends with the place of the play, "SCENE<tab>Denmark."; poems have none.
    body = re.split(r"^SCENE\t(?:.+\n)+", text, maxsplit=1, flags=re.MULTILINE)[-1]
    # The running title stands above every scene; the sonnets have a Roman numeral above each.
    running_title = "^\\s*" + "'?".join(re.escape(part) for part in title.split("'")) + "$"
    numeral = r"(?=^[IVXLC]+\.$)"
    chunks = re.split(f"{running_title}|{numeral}", body, flags=re.MULTILINE)
    scenes = []
    for chunk in chunks:
        paragraphs = [clean_paragraph(block) for block in re.split(r"\n\s*\n", chunk)]
        paragraphs = [paragraph for paragraph in paragraphs if paragraph]
        if paragraphs:
            scenes.append([title, *paragraphs])
    return scenes


def clean_paragraph(block: str) -> str:
    """Brings one block of a file into the form that the module's docstring shows.

    Empty for the few speeches of several speakers at once, which the files set with a brace of `|`.
    """
    if "|" in block:
        return ""
    name = ""
    # "NAME<tab>first line", the name sometimes over two lines; other lines begin with a tab.
    if match := re.match(r"([^\t\n]+(?:\n[^\t\n]+)?)\t", block.strip("\n")):
        name = " ".join(match[1].split())
        block = block.strip("\n")[match.end() :]
    lines = [" ".join(line.split()) for line in block.strip().split("\n")]
    if name.startswith("SCENE"):
        return f"{name}. {' '.join(lines)}"
    if name:
        return "\n".join([f"{name.upper().rstrip(':')}:", *lines])
    if lines[0].startswith("[") and lines[-1].endswith("]"):
        return " ".join(lines)
    return "\n".join(lines)


def split_documents(files: list[list[list[str]]]) -> tuple[list[list[str]], list[list[str]]]:
    """Documents to train on and documents held out; the module's docstring says which are which."""
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for scenes in files:
        number = 0
        for scene in scenes:
            train.append([])
            for passage in cut_passages(scene):
                if number % HELD_OUT_EVERY == HELD_OUT_FIRST:
                    held_out.append(passage)
                    train.append([])
                else:
                    train[-1] += passage
                number += 1
    return [document for document in train if document], held_out


def cut_passages(scene: list[str]) -> Iterator[list[str]]:
    """The scene's paragraphs in passages of PASSAGE_CHARS or more; the last may be shorter."""
    passage: list[str] = []
    for paragraph in scene:
        passage.append(paragraph)
        if sum(map(len, passage)) >= PASSAGE_CHARS:
            yield passage
            passage = []
    if passage:
        yield passage


def parse_speech(paragraph: str) -> tuple[str, str]:
    """The speaker and the words; the speaker is empty where the paragraph is no speech."""
    match = re.fullmatch(r"([^a-z\n]+):\n(.+)", paragraph, flags=re.DOTALL)
    return (match[1], match[2]) if match else ("", paragraph)


def is_reply(words: str) -> bool:
    """Whether a speech is what a chat reply should be: some lines of verse."""
    lines = words.split("\n")
    # Prose runs on in lower case on the next line.
    return 3 <= len(lines) <= 20 and not any(line[0].islower() for line in lines)


@dataclass(frozen=True)
class Exchange:
    """A speech and another speaker's answer, for the chat rows."""

    number: int  # of the speech among its document's paragraphs; the answer's is one more
    direction: str  # the latest stage direction or scene heading before it, or empty
    words: str
    answer: str


def find_exchanges(document: list[str]) -> list[Exchange]:
    """Every short speech that is answered with some lines of verse."""
    exchanges = []
    direction = ""
    for number, (paragraph, following) in enumerate(pairwise(document)):
        if paragraph.startswith("["):
            direction = paragraph[1:-1]
        elif paragraph.startswith("SCENE"):
            direction = paragraph.partition(". ")[2]
        speaker, words = parse_speech(paragraph)
        answerer, answer = parse_speech(following)
        is_exchange = speaker and answerer and speaker != answerer and "[" not in words + answer
        if is_exchange and words.count("\n") < 8 and is_reply(answer):
            exchanges.append(Exchange(number, direction, words, answer))
    return exchanges


def create_conversations(documents: list[list[str]], rng: random.Random) -> list[list[dict[str, str]]]:
    """Chats of one to five exchanges, in the order of the plays; half open with a direction."""
    conversations = []
    for exchanges in map(find_exchanges, documents):
        for first, exchange in enumerate(exchanges):
            chat = []
            if exchange.direction and rng.random() < 0.5:
                chat.append({"role": "system", "content": exchange.direction})
            unused = exchange.number
            for later in exchanges[first : first + rng.randint(1, 5)]:
                # What has just been the answer is not also the next message.
                if later.number >= unused:
                    chat.append({"role": "user", "content": later.words})
                    chat.append({"role": "assistant", "content": later.answer})
                    unused = later.number + 2
            conversations.append(chat)
    return conversations


def train_tokenizer(documents: list[list[str]], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens and the chat template; it prepends `<|bos|>`."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(("\n\n".join(document) for document in documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[END],
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.max_len,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Stream:
    """Documents joined to one row of token ids, and where a training row may begin."""

    ids: torch.Tensor  # int64, on the training device
    starts: torch.Tensor  # int64, on the CPU: the index before each possible beginning

    def draw_rows(self, num_rows: int, row_len: int, rng: torch.Generator) -> torch.Tensor:
        """Rows of ids, (num_rows, row_len + 1): `<|bos|>`, then the text from a random start on."""
        starts = self.starts[: torch.searchsorted(self.starts, len(self.ids) - row_len)]
        chosen = starts[torch.randint(len(starts), (num_rows, 1), generator=rng)]
        rows = self.ids[(chosen + torch.arange(row_len + 1)).to(self.ids.device)]
        rows[:, 0] = SPECIAL_TOKENS.index(BOS)
        return rows


def create_text_stream(documents: list[list[str]], tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Stream:
    """The documents in order; a row may begin at any paragraph."""
    (blank_line,) = tokenizer.encode("\n\n", add_special_tokens=False)
    ids: list[int] = []
    starts: list[int] = []
    for document in documents:
        separator = tokenizer.bos_token_id
        for paragraph in tokenizer(document, add_special_tokens=False).input_ids:
            starts.append(len(ids))
            ids += [separator, *paragraph]
            separator = blank_line
        ids.append(tokenizer.eos_token_id)
    return Stream(torch.tensor(ids, device=device), torch.tensor(starts))


def create_chat_stream(
    conversations: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
) -> Stream:
    """The conversations in order, as the chat template renders them; a row begins with one."""
    ids: list[int] = []
    starts: list[int] = []
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    for conversation in tokenizer(texts, add_special_tokens=False).input_ids:
        starts.append(len(ids))
        ids += conversation
    return Stream(torch.tensor(ids, device=device), torch.tensor(starts))


def create_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model, float32, on the CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.max_len,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids([EOS, END]),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drops from the embeddings and from what each block adds to the residual, while training."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, probability, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def token_losses(model: torch.nn.Module, rows_BS: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of every token but each row's first, (B, S - 1), float32.

    B rows, S tokens in each, V tokens in the vocabulary.
    """
    with torch.autocast(rows_BS.device.type, torch.bfloat16):
        logits_BSV = model(input_ids=rows_BS[:, :-1], use_cache=False).logits
    targets_BS = rows_BS[:, 1:]
    losses = F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")
    return losses.view_as(targets_BS)


@torch.no_grad()
def evaluate(model: torch.nn.Module, ids: torch.Tensor, max_len: int) -> torch.Tensor:
    """Losses over a whole stream cut into rows, (rows, row length); a short rest is left out."""
    model.eval()
    row_len = min(max_len, len(ids) - 1)
    rows = ids.unfold(0, row_len + 1, row_len)
    return torch.cat([token_losses(model, part) for part in rows.split(8)])


@torch.no_grad()
def update_average(average: LlamaForCausalLM, model: LlamaForCausalLM, step: int) -> None:
    """Moves the average so that it remembers about the last tenth of the steps done."""
    weight = min(1.0, 10 / step)
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, weight)


def train(
    model: LlamaForCausalLM,
    text: Stream,
    chat: Stream,
    held_out: Stream,
    recipe: Recipe,
    max_seconds: float,
    seed: int,
) -> dict[str, int | float]:
    """Trains the model and leaves it with the averaged weights that did best on held-out text.

    The learning rate follows a cosine down to zero over the steps, or over the time where that runs
    out first. Overwrites the model's weights. Returns the number of steps done, the best one, and
    the first and last training loss (with dropout).
    """
    device = text.ids.device
    rng = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )
    average = copy.deepcopy(model)
    best_loss, best_step, best_weights = math.inf, 0, model.state_dict()
    losses: list[torch.Tensor] = []
    began = time.monotonic()
    done = 0.0
    step = 0
    while done < 1:
        warmup = min(1.0, (done + 1 / recipe.steps) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup * (1 + math.cos(math.pi * done)) / 2
        row_len = recipe.row_lens[step % len(recipe.row_lens)]
        num_rows = recipe.step_tokens // row_len
        num_chats = round(num_rows * recipe.chat_share)
        rows = [text.draw_rows(num_rows - num_chats, row_len, rng), chat.draw_rows(num_chats, row_len, rng)]
        model.train()
        loss = token_losses(model, torch.cat(rows)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step += 1
        before, done = done, max(step / recipe.steps, (time.monotonic() - began) / max_seconds)
        update_average(average, model, step)
        if int(done * recipe.evaluations) > int(before * recipe.evaluations):
            held_out_loss = evaluate(average, held_out.ids, recipe.max_len).mean().item()
            if held_out_loss < best_loss:
                best_loss, best_step = held_out_loss, step
                best_weights = {name: value.clone() for name, value in average.state_dict().items()}
            log(f"step {step}: loss {torch.stack(losses[-50:]).mean():.3f}, held out {held_out_loss:.3f}, {time.monotonic() - began:.0f} s")
    model.load_state_dict(best_weights)
    return {
        "steps": step,
        "best_step": best_step,
        "first_loss": losses[0].item(),
        "last_loss": torch.stack(losses[-50:]).mean().item(),
    }


@torch.no_grad()
def generate(model: LlamaForCausalLM, prompt_ids: list[int], max_new_tokens: int, num_samples: int) -> torch.Tensor:
    """Continuations at temperature 0.8, (num_samples, at most max_new_tokens), padded."""
    prompt = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples,
    )
    return output[:, len(prompt_ids) :]


def show_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Logs three completions and one chat."""
    prompts = [tokenizer.encode(text) for text in ("", "ROMEO:\n", "To be, or not to be")]
    prompts.append(encode_chat(tokenizer))
    for prompt_ids in prompts:
        (continuation,) = generate(model, prompt_ids, max_new_tokens=200, num_samples=1)
        log("-" * 80 + "\n" + tokenizer.decode([*prompt_ids, *continuation.tolist()]))


def encode_chat(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The token ids of CHAT_PROMPT, up to where the reply begins."""
    text = tokenizer.apply_chat_template(CHAT_PROMPT, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def measure(folder: Path, tokenizer: PreTrainedTokenizerFast, text: Stream, held_out: Stream, recipe: Recipe) -> dict[str, int | float]:
    """The figures of the model as it was written to the folder, in bfloat16."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(text.ids.device)
    losses = evaluate(model, held_out.ids, recipe.max_len)
    train_losses = evaluate(model, text.ids[: len(held_out.ids)], recipe.max_len)
    scored = tokenizer.decode(held_out.ids[1 : losses.numel() + 1], skip_special_tokens=True)
    show_samples(model, tokenizer)
    replies = generate(model, encode_chat(tokenizer), max_new_tokens=300, num_samples=32)
    ended = (replies == tokenizer.convert_tokens_to_ids(END)).any(dim=1)
    return {
        "parameters": model.num_parameters(),
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "train_tokens": len(text.ids),
        "held_out_tokens": len(held_out.ids),
        "train_loss": train_losses.mean().item(),
        "held_out_loss": losses.mean().item(),
        "held_out_perplexity": losses.mean().exp().item(),
        "held_out_bits_per_byte": losses.sum().item() / math.log(2) / len(scored.encode()),
        # Where the context is long; worse than held_out_loss if the positions were not learnt.
        "held_out_loss_last_quarter": losses[:, -(losses.shape[1] // 4) :].mean().item(),
        "chat_replies_ended": ended.float().mean().item(),
    }


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train Light's demo model on Shakespeare.")
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files, one play or poem each")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--minutes", type=float, default=7, help="end the training after this time (7)")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate")
    parser.add_argument("--dropout", type=float, help="dropout probability")
    parser.add_argument("--weight-decay", type=float, help="AdamW's weight decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model in seconds, for CI")
    return parser.parse_args()


def main() -> None:
    began = time.monotonic()
    arguments = parse_arguments()
    chosen = {name: getattr(arguments, name) for name in ("steps", "learning_rate", "dropout", "weight_decay")}
    recipe = replace(
        QUICK if arguments.quick else Recipe(),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    device = torch.device(arguments.device)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(arguments.seed)

    paths = sorted(arguments.data.glob("*.txt"))
    if not paths:
        sys.exit(f"no .txt files in {arguments.data}")
    documents, held_out_documents = split_documents([read_scenes(path) for path in paths])
    tokenizer = train_tokenizer(documents, recipe)
    conversations = create_conversations(documents, random.Random(arguments.seed))
    text = create_text_stream(documents, tokenizer, device)
    chat = create_chat_stream(conversations, tokenizer, device)
    held_out = create_text_stream(held_out_documents, tokenizer, device)
    log(
        f"{len(paths)} files: {len(text.ids)} tokens to train on, {len(held_out.ids)} held out, "
        f"{len(conversations)} conversations of {len(chat.ids)} tokens"
    )

    model = create_model(recipe, tokenizer).to(device)
    add_dropout(model, recipe.dropout)
    progress = train(model, text, chat, held_out, recipe, arguments.minutes * 60, arguments.seed)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)

    figures = measure(arguments.out, tokenizer, text, held_out, recipe)
    summary = {
        **figures,
        **progress,
        "epochs": progress["steps"] * recipe.step_tokens / len(text.ids),
        "seconds": time.monotonic() - began,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
