# ruff: noqa: RUF001
"""Chat templates: the same text as transformers for what models use, refusal for the rest."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from mlxfuse.errors import MLXFuseError, UnsupportedError
from mlxfuse.tokenizer import chat_template
from mlxfuse.tokenizer.chat_template import SIZE, render
from mlxfuse.tokenizer.load import build_tokenizer

from . import vocabularies

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Was ist <b>9×9</b>?\n\"Zitat\" & 'so'", "name": None},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n81", "reasoning": "hm"},
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5]}}}],
    },
    {"role": "tool", "content": "é😀"},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": None, "b": True}}}]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nhi<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n'"
    " ~ message.content ~ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL_USE = """
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ "\\n" -}}
        {{- tool.function.parameters | tojson(indent=2) }}
        {%- for k, v in tool.function.parameters | items %}{{ k }}={{ v }};{% endfor %}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, multi=true, names=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
           and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- set f = call.function %}
            {{- '<call>' ~ f.name ~ ' ' ~ f.arguments | tojson ~ '</call>' }}
        {%- endfor %}
    {%- elif message.content is not string %}
        {%- set texts = message.content | selectattr('type', 'equalto', 'text') %}
        {{- texts | map(attribute='text') | join }}
    {%- else %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {{- '[' + reasoning + '|' + message.reasoning_content + '|' + message.thinking + ']' }}
        {%- endif %}
        {{- message.role.upper() }}: {{ content | trim }}
    {%- endif %}
    {%- if not loop.last %}{{ loop.index }}/{{ loop.length }}{{ '%02d' % loop.revindex }}{% endif %}
{%- endfor %}
{{- ns.last }} {{ ns.names + ['x', 'y'] }} {{ {'a': (1, 2)} }} {{ none }} {{ undefined_name }}
"""
MACROS = """{% macro turn(m, mark='#') -%}
{{ mark * 3 }} {{ m.role | capitalize }}: {{ caller() if caller else (m.content or '-') | string }}
{%- endmacro %}
{%- for m in messages if m.role != 'system' -%}
    {%- if loop.index > 3 %}{% break %}{% endif -%}
    {{ turn(m, mark='=') }}{% call turn(m) %}inner{% endcall %}
    {%- set block %}{{ m.role }}-{{ loop.index0 * 2 ** 3 // 4 % 5 }}{% endset -%}
    {{ block | replace('-', '~') | indent(2) }}{% generation %}{{ bos_token }}gen{% endgeneration %}
{%- endfor -%}
{%- filter upper %}{{ enable_thinking | default(false) }} {{ range(3) | list }}{% endfilter %}
{{- [3, 1, 2] | sort | first }} {{ ['b', 'a'] | sort(reverse=true) | join(', ') }}
{{- messages | map(attribute='role') | unique | list }} {{ 'a,b'.split(',') }}{{ 7 / 2 }}
{{- messages | groupby('role') | length }} {{ 'x' is in ['x'] }} {{ 'abc'[1:] }}
{{- 3.14159 | round(2) }} {{ strftime_now('%Y') | length }} {{ dict(a=1).get('b', 2) }}
{{- ['a'] | tojson(separators=(',', ':')) }}
"""
RARE = """{% for m in messages %}
{%- set role = m['role'].replace('s', '$').center(12).ljust(14).rjust(16) %}
{{- '<{:>14}|{:.2f}>'.format(role, loop.index / 3) }}{{ '{a}'.format_map({'a': loop.index}) }}
{{- ', '.join(['x', m.role]) }}{{ '7'.zfill(3) }}{{ 'a\\tb'.expandtabs(4) }}
{{- m.role.encode('utf-8') }}{{ '%5s%%' % m.role }}{{ ('<b>'|safe) + '<i>' }}{{ '<b>'|e }}
{{- {'k': 1}|xmlattr }}{{ 'www.example.org'|urlize }}{{ m.role|pprint }}{{ 'a b c'|wordwrap(1) }}
{{- 'x' is escaped }}{{ [1, 2, 3]|batch(2)|list }}{{ (1, 2) }}{{ 3.0 }}{{ dict.fromkeys('ab', 1) }}
{{- 'a'|forceescape }}{{ m|items|list|length }}{{ ['b', 'A']|sort(case_sensitive=true) }}
{%- endfor %}
{%- set j = joiner(', ') %}
{%- for x in 'abc' %}{{ j() }}{{ x }}{{ loop.cycle('-', '+') }}{% endfor %}
{%- filter center(30) %}{{ messages|length }}{% endfilter %}{{ [1, 2]|sum(start=1) }}{{ 2 ** 8 }}
{%- block b %}{{ 'in a block' }}{% endblock %}{% autoescape true %}{{ '<' }}{% endautoescape %}
{{- [[1, 2], [3]]|sum(start=[]) }}{{ 'a' ~ 1 ~ none }}{{ messages|map(attribute='role')|join('/') }}
"""


def plain() -> PreTrainedTokenizerFast:
    """The same tokenizer, with transformers' own rendering."""
    tokenizer = build_tokenizer(vocabularies.bpe("qwen2"), "test.gguf")._tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )


@pytest.mark.parametrize(
    "template",
    [CHATML, TOOL_USE, MACROS, RARE],
    ids=["chatml", "tools", "macros", "rare"],
)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_transformers(template: str, tools: Any, prompt: bool) -> None:
    if template is CHATML:
        chat = [message for message in CHAT if isinstance(message.get("content"), str)]
    else:
        chat = CHAT
    metadata = {**vocabularies.bpe("qwen2"), "tokenizer.chat_template": template}
    ours = build_tokenizer(metadata, "test.gguf")
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, "tokenize": False}
    options["enable_thinking"] = True
    expected = plain().apply_chat_template(chat, chat_template=template, **options)
    assert ours.apply_chat_template(chat, **options) == expected
    assert len(expected) > 100


def test_the_wrapper_renders_and_encodes() -> None:
    metadata = {**vocabularies.bpe("llama-bpe"), "tokenizer.chat_template": CHATML}
    tokenizer = build_tokenizer(metadata, "test.gguf")
    assert tokenizer.has_chat_template
    chat = [{"role": "user", "content": "hello"}]
    text = "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    # The template's own BOS and no other, as `encode` would add one.
    assert ids == tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False)
    assert tokenizer.apply_chat_template([chat, chat], tokenize=False) == [text, text]


def test_tools_may_be_functions() -> None:
    def area(width: int) -> int:
        """Area of a square.

        Args:
            width: its side.
        """
        return width * width

    metadata = {
        **vocabularies.bpe("qwen2"),
        "tokenizer.chat_template": "{{ tools[0].function.name }}",
    }
    tokenizer = build_tokenizer(metadata, "test.gguf")
    assert tokenizer.apply_chat_template(CHAT, tools=[area], tokenize=False) == "area"


def test_the_last_message_can_be_continued() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon "}]
    for template, end in [
        (CHATML, "Once upon "),
        (CHATML.replace(".content", ".content|trim"), "Once upon"),
    ]:
        text = render(template, chat, continue_final_message=True)
        assert text.endswith("<|im_start|>assistant\n" + end)
        expected = plain().apply_chat_template(
            chat, chat_template=template, continue_final_message=True, tokenize=False
        )
        assert text == expected
    with pytest.raises(MLXFuseError, match="drops the last message"):
        render("{{ messages[0].content }}", chat, continue_final_message=True)


def test_long_conversations_are_within_the_limits() -> None:
    chat = [{"role": "user", "content": "word " * 200}] * 2000
    template = (
        "{% for m in messages %}{% if loop.index0 == messages|length - 1 or messages[loop.index0:] "
        "%}{{ m.role + ': ' + m.content|trim }}{% endif %}{% endfor %}"
    )
    assert render(template, chat) == ("user: " + ("word " * 200).strip()) * 2000
    long = "é" * (SIZE + 1)
    assert render(CHATML, [{"role": "user", "content": long}]).count("é") == len(long)


TOO_MUCH = {
    "text": "{{ 'a' * 1000000000 }}",
    "reversed operands": "{{ 1000000000 * 'a' }}",
    "many texts": "{% for i in range(999) %}{% set x = 'a' * 9999999 %}{% endfor %}",
    "concatenation": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "addition": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "capture": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "capture of a join": "{% set y %}{{ range(99)|join('a' * 999999) }}{% endset %}",
    "output": "{% for i in range(99999) %}{{ messages[1].content * 999 }}{% endfor %}",
    "static text": "{% for i in range(9999) %}" + "b" * 9999 + "{% endfor %}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "center method": "{{ 'a'.center(1000000000) }}",
    "center in map": "{{ ['a']|map('center', 1000000000)|list }}",
    "zfill": "{{ '1'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "indent": "{{ 'a'|indent(1000000000, true) }}",
    "tojson indent": "{{ {'a': 1}|tojson(indent=1000000000) }}",
    "power": "{{ 2 ** 10000000000 }}",
    "products": "{% set n = namespace(x=10) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "list": "{{ [1] * 1000000000 }}",
    "range": "{{ range(1000000000)|list }}",
    "ranges": "{% for i in range(99999) %}{% set x = range(99999) %}{% endfor %}",
    "batch": "{{ range(9)|batch(1000000000, 'x')|list }}",
    "slice": "{{ range(9)|slice(1000000000)|list }}",
    "join filter": "{{ ([1] * 9999)|join('a' * 9999999)|length }}",
    "join of texts": "{{ (['a' * 9999999] * 99)|join|length }}",
    "join of lists": "{{ ([['a' * 99999] * 99] * 9999)|join|length }}",
    "join by attribute": "{{ ([{'a': 'a' * 9999999}] * 99)|join(attribute='a')|length }}",
    "join method": "{{ ('a' * 9999999).join(['b'] * 999)|length }}",
    "join of a generator": "{{ ('a' * 9999999).join(range(999)|map('string'))|length }}",
    "replace filter": "{{ ('a' * 9999999)|replace('a', 'b' * 9999)|length }}",
    "replace of nothing": "{{ ('a' * 9999999)|replace('', 'b' * 9999)|length }}",
    "replace in map": "{{ ['a' * 9999999]|map('replace', 'a', 'b' * 9999)|list|length }}",
    "replace method": "{{ ('a' * 9999999).replace('a', 'b' * 9999)|length }}",
    "translate": "{{ ('a' * 9999999).translate({97: 'b' * 9999})|length }}",
    "format width": "{{ '{:>1000000000}'.format('a')|length }}",
    "format fields": "{{ ('{0}' * 9999).format('a' * 9999999)|length }}",
    "format filter": "{{ ('%s' * 9999)|format(*(['a' * 9999999] * 9999))|length }}",
    "percent fields": "{{ (('%(a)s' * 9999) % {'a': 'a' * 9999999})|length }}",
    "text of a list": "{{ (['a' * 9999999] * 999)|string|length }}",
    "output of a list": "{{ ['a' * 9999999] * 999 }}",
    "glued lists": "{{ ((['a' * 9999999] * 999) ~ 'a')|length }}",
    "tojson of a list": "{{ (['a' * 9999999] * 999)|tojson|length }}",
    "tojson of indents": "{{ ([1] * 999)|tojson(indent=9999999)|length }}",
    "indents": "{{ ('a\\n' * 999999)|indent(999999)|length }}",
    "indents of text": "{{ ('a\\n' * 999999)|indent('b' * 999999)|length }}",
    "tabs": "{{ ('\t' * 999999).expandtabs(999999)|length }}",
    "wordwrap": "{{ ('a' * 999999)|wordwrap(1, true, 'b' * 99999)|length }}",
    "sum of lists": "{{ ([[1] * 9999999] * 999)|sum(start=[])|length }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
ROWS = "{% for a in m %}{% for b in m %}{% for c in m %}{% for d in m %}"
TOO_LONG = {
    "loops over a list": "{% set m = [1] * 9999 %}" + ROWS + "{% endfor %}" * 4,
    "loops over ranges": ROWS.replace("in m", "in range(99)") + "{% endfor %}" * 4,
    "loops over the conversation": ROWS.replace("in m", "in messages") * 3 + "{% endfor %}" * 12,
    "loops that are counted": "{% set m = [1] * 9999 %}"
    "{% for a in m %}{% for b in m %}{{ loop.length }}{% endfor %}{% endfor %}",
    "filtered loop": "{% for c in 'ab' * 4999999 if c > 'b' %}{% endfor %}",
    "loops in a macro": "{% macro f(m) %}" + ROWS + "{% endfor %}" * 4 + "{% endmacro %}"
    "{{ f([1] * 9999) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}"
    "{% endfor %}",
    "sorting": "{% set l = range(99999)|list %}{% for i in l %}{% if l|sort %}{% endif %}"
    "{% endfor %}",
    "searching": "{% set a = 'ab' * 999999 %}{% for i in range(99999) %}"
    "{% if a.find('ba' * 999 + 'c') %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_large_values_are_refused_before_they_are_made(template: str) -> None:
    tracemalloc.start()
    try:
        started = time.thread_time()
        with pytest.raises(UnsupportedError, match="chat template"):
            render(template, CHAT)
        spent, (_, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 250 * 2**20
    assert spent < 10  # tracing memory costs a factor of ten


@pytest.mark.parametrize("template", TOO_LONG.values(), ids=TOO_LONG)
def test_long_runs_meet_the_deadline(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    started = time.thread_time()
    with pytest.raises(UnsupportedError, match=r"takes more than 0\.1 seconds"):
        render(template, CHAT)
    assert time.thread_time() - started < 1


def test_nested_loops_and_a_gigabyte_are_refused_within_two_seconds() -> None:
    names = ("text", "addition", "join filter", "replace method", "output of a list")
    for template in (TOO_LONG["loops over a list"], *map(TOO_MUCH.__getitem__, names)):
        started = time.thread_time()
        with pytest.raises(UnsupportedError):
            render(template, CHAT)
        assert time.thread_time() - started < 2


def test_control_the_plain_sandbox_makes_large_values() -> None:
    # The cases above measure our bounds, not jinja's: scaled down, jinja renders them.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    for template in (TOO_MUCH["text"], TOO_MUCH["center filter"], TOO_MUCH["percent width"]):
        text = environment.from_string(template.replace("1000000000", "20000000")).render()
        assert len(text) == 20_000_000


def test_renderings_in_threads_have_their_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    results: dict[str, Any] = {}

    def run(name: str, template: str) -> None:
        try:
            results[name] = render(template, CHAT)
        except UnsupportedError as error:
            results[name] = error

    threads = [
        threading.Thread(target=run, args=("long", TOO_LONG["loops over a list"])),
        *(
            threading.Thread(target=run, args=(str(i), "{{ 'a' * 1000000 }}{{ messages|length }}"))
            for i in range(4)
        ),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(results.pop("long"), UnsupportedError)
    assert set(results.values()) == {"a" * 1_000_000 + "6"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({}) }}", "unsafe"),
        ("{% set n = namespace(_x=1) %}{% set n.__class__ = 1 %}", "takes no name like '__class"),
        ("{% include 'x' %}", "no loader"),
        ("{{ 'a'|nothing }}", "No filter named 'nothing'"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "malformed: it nests too deeply"),
        ("{{ 1" + "+1" * 20000 + " }}", "malformed: it nests too deeply"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "malformed: too many levels of ind"),
        ("{% for i in 1 %}{% endfor %}", "not iterable"),
        ("{% if %}", r"Expected an expression.* \(line 1\)"),
        ("{{ 'a\n\n' ", r"\(line"),
    ],
)
def test_what_templates_may_not_do_is_refused_by_name(template: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        render(template, CHAT)


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(MLXFuseError, match="refuses the conversation: roles must alternate") as e:
        render("{{ raise_exception('roles must alternate') }}", CHAT)
    assert not isinstance(e.value, UnsupportedError)


def test_refusal_reaches_the_wrapper() -> None:
    metadata = {**vocabularies.bpe("qwen2"), "tokenizer.chat_template": TOO_MUCH["text"]}
    tokenizer = build_tokenizer(metadata, "test.gguf")
    with pytest.raises(UnsupportedError, match="makes something of more than"):
        tokenizer.apply_chat_template(CHAT)


def test_objects_in_messages_become_plain() -> None:
    class Role(str):
        def upper(self) -> str:
            raise AssertionError("called")

    class Opaque:
        pass

    chat = [{"role": Role("user"), "content": Opaque(), "pair": (1, True, None)}]
    text = render(
        "{{ messages[0].role.upper() }} {{ messages[0].content }} {{ messages[0].pair }}", chat
    )
    assert text == "USER <Opaque> (1, True, None)"
    deep: Any = []
    for _ in range(99_999):
        deep = [deep]
    with pytest.raises(UnsupportedError, match="nests too deeply"):
        render("", [{"content": deep}])
