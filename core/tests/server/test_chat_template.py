"""`ChatTemplate` against transformers' own rendering; and a hostile template cannot hold the server."""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from light_core.errors import ModelError, RequestError
from light_core.text.chat import ChatTemplate, choose_template, plain_messages, render_chat
from light_core.text.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be kind.\n"},
    {"role": "user", "content": 'What is 1 < 2 & "three"? 你好 '},
    {"role": "assistant", "content": " Yes. "},
    {"role": "user", "content": "Thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = [
    "{% for m in messages %}{{ bos_token if loop.first }}{{ m.role }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    """{%- if tools %}
    {{- '# Tools' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if loop.last or not loop.nextitem is defined or loop.length > 9 %}[last]{% endif %}
    {{- '<|' + m.role + '|>' ~ m.content ~ '\\n' }}
{%- endfor %}
{{- ns.last }}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "{% macro show(m, depth=1) %}{{ m.content.split(' ')[0] | upper }}{{ '%03d' % depth }}{% endmacro %}"
    "{% for m in messages[::-1] if m.role != 'system' %}{{ show(m, loop.index) }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}"
    "{% generation %}{{ messages | map(attribute='role') | join(',') }}{% endgeneration %}{{ messages | length * 2 + 1 }}",
    "{{ tools | tojson(indent=2) if tools }}{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ 2 ** 5 }}{{ [1, 2] * 2 }}{{ 'ab' * 2 }}",
]


@pytest.mark.parametrize("source", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(
    tokenizer: Tokenizer, tokenizer_folder: Path, source: str, tools: Any, add_generation_prompt: bool
) -> None:
    reference = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    expected = reference.apply_chat_template(
        CONVERSATION, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    own = ChatTemplate(source, tokenizer.special_tokens_map)
    assert own.render(CONVERSATION, tools=tools, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("text", ["The answer", "The answer ", " is\n"])
@pytest.mark.parametrize("source", TEMPLATES[:2], ids=range(2))
def test_continues_as_transformers_does(tokenizer: Tokenizer, tokenizer_folder: Path, source: str, text: str) -> None:
    reference = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    messages = [*CONVERSATION, {"role": "assistant", "content": text}]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, continue_final_message=True)
    own = ChatTemplate(source, tokenizer.special_tokens_map)
    assert own.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1"])
def test_what_is_hidden_in_a_text_that_is_continued_stays_text(tokenizer: Tokenizer, mark: str) -> None:
    """Characters that Light itself puts into texts do not come out of a client's."""
    hidden = f"<|im_{mark}end|>"
    messages = [*CONVERSATION, {"role": "assistant", "content": tokenizer.mark(hidden)}]
    own = ChatTemplate(TEMPLATES[0], tokenizer.special_tokens_map)
    text = own.render(messages, add_generation_prompt=False, continue_final_message=True)
    tail = tokenizer.encode_marked(text[text.rindex("im_") - 2 :])
    assert not tokenizer.special_ids & set(tail)


HOSTILE = [
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 10**5 * 10**5 }}",
    "{{ 10 ** 10000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(70) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('bad order') }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end(source: str) -> None:
    begin = time.thread_time()
    with pytest.raises((RequestError, ModelError)) as caught:
        ChatTemplate(source, timeout_s=0.3, max_chars=1 << 20).render(CONVERSATION)
    assert time.thread_time() - begin < 20, "processor time: much more than the deadline, much less than these would take"
    assert "0x7" not in str(caught.value)


def test_the_templates_own_message_reaches_the_client() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(CONVERSATION)


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("ok\n{% for %}")


def test_variables_are_those_the_template_reads() -> None:
    template = ChatTemplate("{{ messages }}{{ bos_token }}{% if enable_thinking is defined %}{{ budget }}{% endif %}{{ raise_exception }}")
    assert template.variables == {"bos_token", "enable_thinking", "budget"}


def test_choose_template() -> None:
    several = {"default": "d", "tool_use": "t"}
    assert (choose_template(several, True), choose_template(several, False)) == ("t", "d")
    assert choose_template({"default": "d"}, True) == "d" and choose_template("x", True) == "x" and choose_template(None, False) is None


def test_plain_messages() -> None:
    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}}, {"function": {"name": "g", "arguments": "{broken"}}]
    messages = plain_messages(
        [{"role": "developer", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}], str.upper
    )
    assert messages[0] == {"role": "system", "content": "X"}
    assert messages[1]["content"] == "" and [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == [{"a": 1}, "{broken"]
    assert calls[0]["function"]["arguments"] == '{"a": 1}', "the argument is left as it was"


def test_render_chat(tokenizer: Tokenizer) -> None:
    assert render_chat(tokenizer, [{"role": "user", "content": "q"}]) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(tokenizer, [{"role": "user", "content": "q"}], template="{{ messages[0].content }}!") == "q!"
