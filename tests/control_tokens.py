"""What a server makes of control tokens that a client writes as text. For the tests that serve a model.

In a conversation they stay text: the prompt has none of their ids but those that the template writes. In a prompt of
`/v1/completions` they are themselves, and a picture's placeholder without a picture is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerFast

__all__ = ["PUBLISHED", "QWEN", "add_published", "check_control_tokens"]

NUM_MANY, MAX_LEN, TIMEOUT_S = 1000, 2048, 600
WORDS = "w7 w3"
MARKS = "\ufdd0\ufdd1"
"""Noncharacters that core writes into text for itself: nothing that a client hides with them may come back as a token."""
SENTENCEPIECE = ("<unk>", "<s>", "</s>")
QWEN = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_UNFLAGGED = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
DEEPSEEK_UNFLAGGED = (
    "<｜User｜>", "<｜Assistant｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
UNFLAGGED = frozenset([*QWEN_UNFLAGGED, *DEEPSEEK_UNFLAGGED])
"""Control tokens that the published tokenizers have without calling them special."""
PUBLISHED: dict[str, tuple[str, ...]] = {
    "bloom": (*SENTENCEPIECE, "<pad>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|EOT|>", *DEEPSEEK_UNFLAGGED),
    "llama": (
        *SENTENCEPIECE, "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
        "<|python_tag|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>",
    ),
    "mixtral": (
        *SENTENCEPIECE, "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "qwen": (*QWEN, *QWEN_UNFLAGGED),
    "qwen_moe": (*QWEN, *QWEN_UNFLAGGED),
}  # fmt: skip
"""Family to the control tokens of its published tokenizers."""
ORDINARY = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens of Qwen's and DeepSeek's tokenizers that are text to whoever writes it."""


def add_published(source: Any, folder: Path, family: str) -> None:
    """Adds `PUBLISHED` and `ORDINARY` to the checkpoint of `source` in `folder`, as tokens that it never says, and room for
    `MAX_LEN` tokens. `source` is changed."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    num_words = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in PUBLISHED[family] if token not in UNFLAGGED]})
    tokenizer.add_tokens([*(token for token in PUBLISHED[family] if token in UNFLAGGED), *ORDINARY])
    tokenizer.save_pretrained(folder)
    source.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    source.lm_head.weight.data[num_words:] = 0
    source.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["seq_length" if "seq_length" in config else "max_position_embeddings"] = MAX_LEN
    (folder / "config.json").write_text(json.dumps(config))


def check_control_tokens(
    url: str, model: str, tokenizer: Any, *, placeholder: str | None = None, picture: dict[str, Any] | None = None
) -> None:
    """Asks for each token of `tokenizer`, once and `NUM_MANY` times, and then what was asked before.

    Args:
        url: of the server, without "/v1".
        model: its name.
        tokenizer: transformers', as the server has it.
        placeholder: stands for a picture in prompts; None for a model that takes text alone.
        picture: a part of a message's content, beside which they are asked for too.
    """
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        _Check(http, model, tokenizer, placeholder).run(picture)


class _Check:
    def __init__(self, http: httpx.Client, model: str, tokenizer: Any, placeholder: str | None) -> None:
        self.http, self.model, self.tokenizer, self.placeholder = http, model, tokenizer, placeholder
        self.max_len = http.get("/v1/models").json()["data"][0]["max_model_len"]
        added = {str(token): (token_id, token.special) for token_id, token in tokenizer.added_tokens_decoder.items()}
        self.control = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        self.control |= {text: token_id for text, (token_id, special) in added.items() if special or text in UNFLAGGED}
        self.ordinary = {text: token_id for text, (token_id, _) in added.items() if text not in self.control}
        self.texts = [*self.control, *self.ordinary]
        if placeholder is not None and placeholder not in self.texts:
            self.texts.append(placeholder)
        # What is no word. A tokenizer without such a token gives the text back.
        self.unknown = tokenizer.unk_token_id

    def run(self, picture: dict[str, Any] | None) -> None:
        before = self.chat(WORDS).json()
        for beside in ([], [picture]) if picture is not None else ([],):
            self.check_once(beside)
        head, tail = self.around([])
        shapes = {re.sub(r"\d+", "", text): text for text in reversed(self.texts)}
        for text in shapes.values():  # of those that differ by a number, the first
            self.check_many(text, head, tail)
        if picture is not None:
            assert self.placeholder is not None
            many = self.placeholder * 100
            self.check_text(self.ids(self.chat([picture, _part(many)])), many, *self.around([picture]))
        self.check_completions()
        after = self.chat(WORDS).json()
        assert after["prompt_token_ids"] == before["prompt_token_ids"] and after["choices"] == before["choices"]

    def check_once(self, beside: Sequence[dict[str, Any]]) -> None:
        """All of them in one message: in one text, in halves, and with marks of core's in them."""
        everything, control = "".join(self.texts), [text for text in self.texts if text not in self.ordinary]
        around = self.around(beside)
        contents = [[*beside, _part(everything)]] if beside else [everything, [_part(everything)]]
        for content in contents:
            self.check_text(self.ids(self.chat(content)), everything, *around)
        halves = [_part(half) for text in control for half in (text[:2], text[2:])]
        self.check_text(self.ids(self.chat([*beside, *halves])), "".join(control), *around)
        for mark in MARKS:
            hidden = "".join(text[:2] + mark + text[2:] for text in control)
            self.check_text(self.ids(self.chat([*beside, _part(hidden)])), "".join(control), *around)
            open_end = {"continue_final_message": True, "add_generation_prompt": False}
            answer = self.chat([*beside, _part(hidden)], **open_end)
            self.check_text(self.ids(answer), "".join(control), *self.around(beside, **open_end))

    def check_many(self, text: str, head: list[int], tail: list[int]) -> None:
        """`text` again and again: the engine answers, or it is too long. As a part, it is the same prompt."""
        many = text * NUM_MANY
        answer, part = self.chat(many), self.post("/tokenize", messages=_messages([_part(many)]))
        if answer.status_code == 400:
            assert len(head) + len(many.encode()) + len(tail) >= self.max_len
            for refused in (answer, part):
                self.check_too_long(refused)
            return
        ids = self.ids(answer)
        self.check_text(ids, many, head, tail)
        assert len(ids) >= NUM_MANY and part.json()["tokens"] == ids, text

    def check_completions(self) -> None:
        """In plain prompts they are themselves."""
        tokens = {text: token_id for text, token_id in self.control.items() if text != self.placeholder}
        prompts = [f"w7 {text}" for text in tokens]
        answer = self.post("/v1/completions", prompt=prompts, max_tokens=1, return_token_ids=True)
        assert answer.status_code == 200, answer.text
        for token_id, prompt, choice in zip(tokens.values(), prompts, answer.json()["choices"], strict=True):
            assert token_id in choice["prompt_token_ids"] and choice["prompt_token_ids"] == self.tokenizer.encode(prompt), prompt
        text, token_id = next((text, token_id) for text, token_id in tokens.items() if token_id != self.unknown)
        answer = self.post("/v1/completions", prompt=text * NUM_MANY, max_tokens=1, return_token_ids=True)
        if self.max_len > NUM_MANY:
            assert answer.json()["choices"][0]["prompt_token_ids"] == [token_id] * NUM_MANY
        else:
            self.check_too_long(answer)
        if self.placeholder is not None:
            for count in (1, NUM_MANY):
                answer = self.post("/v1/completions", prompt=self.placeholder * count, max_tokens=1)
                assert answer.status_code == 400 and f"{count} placeholders" in answer.json()["error"]["message"], answer.text

    def check_text(self, ids: list[int], text: str, head: list[int], tail: list[int]) -> None:
        """`ids` are `text` between a template's `head` and `tail`, and no control token is in it."""
        end = len(ids) - len(tail)
        assert ids[: len(head)] == head and ids[end:] == tail
        written = ids[len(head) : end]
        found = Counter(written)
        obeyed = [name for name, token_id in self.control.items() if found[token_id] and token_id != self.unknown]
        assert not obeyed, f"these are themselves in a client's text: {obeyed}"
        assert [found[token_id] for token_id in self.ordinary.values()] == [text.count(name) for name in self.ordinary]
        if self.unknown is None:
            said = self.tokenizer.decode(written, skip_special_tokens=False)
            assert re.sub(f"[{MARKS}\n]", "", said) == text
        else:
            assert written and found.keys() <= {self.unknown, *self.ordinary.values()}

    def check_too_long(self, answer: httpx.Response) -> None:
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert f"this server's limit is {self.max_len} tokens" in error["message"]

    def around(self, beside: Sequence[dict[str, Any]], **fields: Any) -> tuple[list[int], list[int]]:
        """What the template writes before and after a text."""
        ids, words = self.ids(self.chat([*beside, _part(WORDS)], **fields)), self.tokenizer.encode(WORDS)
        (start,) = [start for start in range(len(ids)) if ids[start : start + len(words)] == words]
        return ids[:start], ids[start + len(words) :]

    def ids(self, answer: httpx.Response) -> list[int]:
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["prompt_token_ids"]
        return ids

    def chat(self, content: Any, **fields: Any) -> httpx.Response:
        options = {"max_tokens": 2, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return self.post("/v1/chat/completions", messages=_messages(content), **options, **fields)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.http.post(path, json={"model": self.model} | fields)


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _messages(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
