"""Conversations to prompt text: the model's Jinja template, with Hugging Face's conventions, in a bounded sandbox.

A template comes with a model, so it is not trusted: it sees plain JSON data, and it may not run longer than a deadline
nor build values over a size. Not here: parsing of requests, tokenisation. Callers: the HTTP server, the offline API.
"""

import datetime
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from light_core.errors import ModelError, RequestError

__all__ = ["RESERVED_VARIABLES", "ChatTemplate", "choose_template"]

RESERVED_VARIABLES = frozenset(
    "messages tools documents conversation chat_template tokenize tokenizer return_tensors return_dict padding truncation max_length "
    "add_generation_prompt continue_final_message raise_exception strftime_now namespace dict range lipsum cycler joiner self".split()
)
"""Names that `chat_template_kwargs` may not set: they are the server's, or the template language's."""

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

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, *, timeout_s: float = 5.0, max_chars: int = 8 << 20) -> None:
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


def _plain(error: TemplateError) -> str:
    # Messages of Jinja can quote the repr of an object, with its address.
    return re.sub(r"0x[0-9a-fA-F]+", "0x", " ".join(str(error.message or type(error).__name__).split()))[:500]


def _with_mark(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    last = messages[-1] if messages else {}
    if not isinstance(last.get("content"), str) or not last["content"]:
        raise RequestError("continue_final_message needs a last message with text", "continue_final_message")
    # The space tells whether the template trims contents.
    return [*messages[:-1], {**last, "content": last["content"].replace(CONTINUE_MARK, "") + CONTINUE_MARK + " "}]


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

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
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
