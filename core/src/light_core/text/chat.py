"""Conversations to prompt text: the model's Jinja template, with Hugging Face's conventions, in a bounded sandbox.

A template comes with a model, so it is not trusted: it sees plain JSON data, and it may not run longer than a deadline
nor build values over a size. Not here: tokenisation. Callers: the HTTP server, the offline API.
"""

import datetime
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from light_core.errors import ModelError, RequestError

if TYPE_CHECKING:
    from light_core.text.tokenizer import Tokenizer

__all__ = ["RESERVED_VARIABLES", "ChatTemplate", "MediaContent", "choose_template", "map_strings", "plain_messages", "render_chat"]

RESERVED_VARIABLES = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "conversation",
        "chat_template",
        "tokenize",
        "tokenizer",
        "return_tensors",
        "return_dict",
        "padding",
        "truncation",
        "max_length",
        "add_generation_prompt",
        "continue_final_message",
        "raise_exception",
        "strftime_now",
        "namespace",
        "dict",
        "range",
        "lipsum",
        "cycler",
        "joiner",
        "self",
    ]
)
"""Names that `chat_template_kwargs` may not set: they are the server's, or the template language's."""

_TEXT_PARTS = ("text", "input_text", "refusal")
_MEDIA_PARTS = {"image_url": "image", "input_image": "image", "image": "image", "image_pil": "image"}
_MAX_ROLE_CHARS = 64
_PROBE = "7f3a9c"

CONTINUE_MARK = "\ufdd1"
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5,})")


class ChatTemplate:
    """A compiled chat template. Immutable; rendering is thread safe and blocks, at most for about `timeout_s`.

    Args:
        source: the Jinja source.
        special_tokens: role to text ("bos_token": "<s>"), as variables of the template.
        timeout_s: deadline of one rendering.
        max_chars: bound of the output and of every string that is built on the way.

    Raises:
        ModelError: the source is not a valid template.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, *, timeout_s: float = 5.0, max_chars: int = 8 << 20
    ) -> None:
        self._environment = _Environment(timeout_s, max_chars)
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = self._environment.from_string(source)
            self.variables = frozenset(find_undeclared_variables(self._environment.parse(source))) - RESERVED_VARIABLES
        except (TemplateError, RecursionError) as error:
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            raise ModelError("the chat template cannot be compiled", f"{line}{error}", "give another one with --chat-template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: plain JSON data, `content` a string.
            tools: tool definitions, passed through to the template.
            add_generation_prompt: end with the header of the assistant's reply.
            continue_final_message: end within the last message, so that the model goes on with it.
            variables: more variables; the reserved ones are refused.

        Raises:
            RequestError: the template refuses these messages, needs too long, or builds too long a text.
        """
        for name in variables or ():
            if name in RESERVED_VARIABLES or name.startswith("_"):
                allowed = ", ".join(sorted(self.variables)) or "none"
                raise RequestError(f"chat_template_kwargs may not set {name!r:.60}; this template reads: {allowed}", "chat_template_kwargs")
        if continue_final_message:
            messages = _with_mark(messages)
        values = {**self._special_tokens, **(variables or {}), "messages": list(messages), "tools": list(tools) if tools else None}
        values.update(documents=None, add_generation_prompt=add_generation_prompt)
        text = self._run(values)
        return _cut_at_mark(text) if continue_final_message else text

    def takes_parts(self) -> bool:
        """Whether it reads contents that are lists of parts, as templates of models with media do. Renders a message."""
        parts = [{"type": "text", "text": _PROBE}]
        try:
            text = self.render([{"role": "user", "content": parts}])
        except RequestError:
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    def _run(self, values: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        length = 0
        try:
            with self._environment.deadline():
                for piece in self._template.generate(values):
                    length += len(piece)
                    self._environment.check(length)
                    pieces.append(piece)
        except RequestError:
            raise
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {_plain(error)}", "messages") from error
        except Exception as error:  # a template can raise any Python error on data that it does not expect
            raise RequestError(f"the chat template cannot render these messages ({type(error).__name__})", "messages") from error
        return "".join(pieces)


def choose_template(template: str | Mapping[str, str] | None, with_tools: bool) -> str | None:
    """The source to use where a tokenizer has several: "tool_use" with tools, else "default"."""
    if template is None or isinstance(template, str):
        return template
    return template.get("tool_use" if with_tools and "tool_use" in template else "default")


def render_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    default_template: str | None = None,
    change: Callable[[str], str] | None = None,
    media: "Callable[[bool], MediaContent] | None" = None,
    **options: Any,
) -> str:
    """The prompt text of one conversation, with `template`, the tokenizer's or `default_template`.

    Args:
        tokenizer: gives the template and the special tokens.
        messages: as clients of the chat API send them.
        template: Jinja source that replaces the tokenizer's.
        default_template: Jinja source for a tokenizer that has none.
        change: as `plain_messages` has it; applied to the tools' texts as well.
        media: makes what takes the parts that are not text, told whether the template takes lists of parts.
        **options: as `ChatTemplate.render` has them.

    Raises:
        RequestError: there is no template, or it refuses the messages.
        ModelError: the template cannot be compiled.
    """
    source = template or choose_template(tokenizer.chat_template, bool(options.get("tools"))) or default_template
    if not source:
        raise RequestError("this model has no chat template", "messages")
    if options.get("tools") and change is not None:
        options["tools"] = map_strings(options["tools"], change)
    compiled = ChatTemplate(source, tokenizer.special_tokens_map)
    content = None if media is None else media(compiled.takes_parts())
    return compiled.render(plain_messages(messages, change, content), **options)


def plain_messages(
    messages: Sequence[Mapping[str, Any]], change: Callable[[str], str] | None = None, media: "MediaContent | None" = None
) -> list[dict[str, Any]]:
    """Messages as templates expect them: `content` a string (or a list of parts), tool arguments an object, no null.

    Args:
        messages: as clients send them.
        change: applied to the texts of every message but the assistant's, whose text is the model's own.
        media: takes the parts that are not text; None refuses them.

    Raises:
        RequestError: a message has no role, or content that is not what the model takes.
    """
    return [_plain_message(index, message, change, media) for index, message in enumerate(messages)]


class MediaContent:
    """Takes the items of a conversation, in order, and says what stands for each in its message's content.

    Args:
        marker: kind of item to its text in a prompt; raises `RequestError` for a kind that the model does not take.
        literal: what makes placeholders in clients' text plain text.
        as_parts: the template takes lists of parts, and writes an item's placeholder itself.

    Attributes:
        items: (kind, part, name of its field) of each so far.
    """

    def __init__(self, marker: Callable[[str], str], literal: Callable[[str], str], as_parts: bool) -> None:
        self._marker, self._literal, self._as_parts = marker, literal, as_parts
        self.items: list[tuple[str, Mapping[str, Any], str]] = []

    def content(self, index: int, parts: Any, change: Callable[[str], str]) -> Any:
        """The content of message `index`: `parts` is a string, null or a list of parts; `change` is for its texts."""
        # Texts side by side are one text before they are changed: no part of a special token hides in each of two. A template that
        # takes parts would write them one after the other.
        pieces: list[str | _Item] = []
        between = "" if self._as_parts else "\n"
        for piece in _parts(index, parts, self):
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += between + piece
            else:
                pieces.append(piece)
        shown = [piece if isinstance(piece, _Item) else self._literal(change(piece)) for piece in pieces]
        if self._as_parts:
            return [{"type": piece.kind} if isinstance(piece, _Item) else {"type": "text", "text": piece} for piece in shown]
        return "".join(self._marker(piece.kind) if isinstance(piece, _Item) else piece for piece in shown)

    def take(self, kind: str, part: Mapping[str, Any], name: str) -> "_Item":
        """Notes an item."""
        self._marker(kind)
        self.items.append((kind, part, name))
        return _Item(kind)


class _Item(NamedTuple):
    """An item among the texts of a message."""

    kind: str


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` (plain JSON data) with `change` applied to every string in it, but not to roles and names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {name: item if name == "role" else map_strings(item, change) for name, item in value.items()}
    return value


def _plain_message(
    index: int, message: Mapping[str, Any], change: Callable[[str], str] | None, media: MediaContent | None
) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not 0 < len(role) <= _MAX_ROLE_CHARS:
        raise RequestError(f"messages[{index}].role must be a string of 1 to {_MAX_ROLE_CHARS} characters", "messages")
    plain: dict[str, Any] = {name: value for name, value in message.items() if value is not None and name != "content"}
    plain["role"] = "system" if role == "developer" else role
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(index, plain["tool_calls"])
    changing = change if change is not None and role != "assistant" else _same
    plain = map_strings(plain, changing)
    content = message.get("content")
    if media is not None:
        plain["content"] = media.content(index, content, changing)
    else:
        plain["content"] = changing("\n".join(str(piece) for piece in _parts(index, content, None)))
    return plain


def _same(text: str) -> str:
    return text


def _parts(index: int, content: Any, media: MediaContent | None) -> "list[str | _Item]":
    """The texts of a content, and its items where `media` takes them, in order."""
    if content is None:
        return [""]
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise RequestError(f"messages[{index}].content must be a string, null or a list of parts", "messages")
    pieces: list[str | _Item] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if media is not None and isinstance(kind, str) and kind in _MEDIA_PARTS:
            pieces.append(media.take(_MEDIA_PARTS[kind], part, f"messages[{index}].content[{number}].{kind}"))
            continue
        if kind not in _TEXT_PARTS:
            taken = "text" if media is None else "text and image_url"
            raise RequestError(f"messages[{index}].content: this model takes parts of type {taken}, got {kind!r:.60}", "messages")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise RequestError(f"messages[{index}].content: a part of type {kind} needs a string", "messages")
        pieces.append(text)
    return pieces


def _tool_calls(index: int, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"messages[{index}].tool_calls must be a list of objects", "messages")
    plain = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}
        plain.append(call)
    return plain


def _arguments(text: str) -> Any:
    # Templates expect the object. What a model wrote need not be JSON; it then stays text.
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _plain(error: TemplateError) -> str:
    # Messages of Jinja can quote the repr of an object, with its address.
    return re.sub(r"0x[0-9a-fA-F]+", "0x", " ".join(str(error.message or type(error).__name__).split()))[:500]


def _with_mark(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    last = messages[-1] if messages else {}
    content = last.get("content")
    parts = content if isinstance(content, list) and content else [{"type": "text", "text": content}]
    text = parts[-1].get("text")
    if not isinstance(text, str) or not text:
        raise RequestError("continue_final_message needs a last message with text", "continue_final_message")
    # The space tells whether the template trims contents. A mark in the text itself stays: without it, what stands around it might
    # be a special token that `Tokenizer.mark` has not seen.
    marked = text + CONTINUE_MARK + " "
    shown = [*parts[:-1], {"type": "text", "text": marked}] if isinstance(content, list) else marked
    return [*messages[:-1], {**last, "content": shown}]


def _cut_at_mark(text: str) -> str:
    end = text.rfind(CONTINUE_MARK)
    if end < 0:
        raise RequestError("the chat template drops the last message's text: it cannot be continued", "continue_final_message")
    return text[:end] if text[end + 1 : end + 2] == " " else text[:end].rstrip()


# ------------------------------------------------------------------------------------------- the bounded sandbox


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounds(NodeTransformer):
    """Puts a clock into every loop and a size check behind every operation that can make a value grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_ticking", [], [], None, None, lineno=node.lineno)
        return node

    def _bound(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "_bounded", [], [], None, None, lineno=node.lineno)

    visit_Concat = visit_Add = visit_Filter = _bound


class _Deadline:
    """Sets the clock of the calling thread for the time of a `with` block."""

    def __init__(self, clock: threading.local, timeout_s: float) -> None:
        self._clock, self._timeout_s = clock, timeout_s

    def __enter__(self) -> None:
        self._clock.end = time.monotonic() + self._timeout_s

    def __exit__(self, *_: object) -> None:
        del self._clock.end


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, timeout_s: float, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self._timeout_s, self._max_chars = timeout_s, max_chars
        self._clock = threading.local()
        self.filters.update(tojson=_to_json, _ticking=self._ticking, _bounded=self._bounded)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def deadline(self) -> _Deadline:
        return _Deadline(self._clock, self._timeout_s)

    def check(self, length: int = 0) -> None:
        """Raises `RequestError` past the deadline or over the size."""
        if length > self._max_chars:
            raise RequestError(f"the chat template makes more than {self._max_chars} characters of these messages", "messages")
        # Without a clock the template is being compiled, where constants are folded.
        if time.monotonic() > getattr(self._clock, "end", float("inf")):
            raise RequestError(f"the chat template needs more than {self._timeout_s:g} s for these messages", "messages")

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        source = _Bounds().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def _ticking(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.check()
            yield value

    def _bounded(self, value: Any) -> Any:
        self.check(len(value) if isinstance(value, (str, list, tuple)) else 0)
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The odd names leave every keyword to the template, as in the base class.
        __self.check()
        return __self._bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise RequestError("the chat template formats a field that is too wide", "messages")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    self.check(len(value) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            self.check(0 if bits < 4096 else self._max_chars + 1)
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which prompts must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
