import copy
import re

import pytest

from ssd_jax.errors import RequestError
from ssd_jax.text import render_chat

HEADER_STYLE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set head = '<|head|>' + message.role + '<|/head|>\\n\\n' %}
    {{- head + message['content'] | trim + '<|turn_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

MARKER_STYLE = """\
{%- if tools %}
<|from|>system
Tools:
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
<|to|>
{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
<|from|>{{ message.role }}
{{ message.content }}<|to|>
{% endfor %}
{% if add_generation_prompt %}
<|from|>assistant
{% if enable_thinking is defined and not enable_thinking %}
<think></think>
{% endif %}
{% endif %}
"""

HELLO = [{"role": "user", "content": " Hi <b> & 'you' "}]


def render(template, messages=HELLO, **options):
    return render_chat(template, messages, bos_token="<s>", eos_token="</s>", **options)


def test_header_style():
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert render(HEADER_STYLE, messages) == (
        "<s><|head|>system<|/head|>\n\nBe brief.<|turn_end|>"
        "<|head|>user<|/head|>\n\nHi <b> & 'you'<|turn_end|>"
        "<|head|>assistant<|/head|>\n\n"
    )
    assert render(HEADER_STYLE, messages, add_generation_prompt=False).endswith("<|turn_end|>")


def test_marker_style_with_loop_controls_and_extra_variables():
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "Hi"}]
    assert render(MARKER_STYLE, messages) == "<|from|>user\nHi<|to|>\n<|from|>assistant\n"
    assert render(MARKER_STYLE, messages, extra={"enable_thinking": False}).endswith(
        "<|from|>assistant\n<think></think>\n"
    )


def test_tools_are_json_without_html_escapes():
    tools = [{"name": "größe", "description": "a < b & 'c'"}]
    assert '{"name": "größe", "description": "a < b & \'c\'"}\n' in render(
        MARKER_STYLE, tools=tools
    )
    assert render("{{ {'b': [1], 'a': 2} | tojson(indent=1, sort_keys=true) }}") == (
        '{\n "a": 2,\n "b": [\n  1\n ]\n}'
    )


def test_generation_block_passes_its_body_through():
    template = (
        "{% for m in messages %}{% generation %}[{{ m.role }}]{% endgeneration %}{% endfor %}"
    )
    assert render(template) == "[user]"


def test_absent_tokens_are_empty_and_the_date_is_formatted():
    template = "[{{ bos_token }}{{ eos_token }}]{{ strftime_now('%Y-%m-%d') }}"
    text = render_chat(template, HELLO, bos_token=None, eos_token=None)
    assert re.fullmatch(r"\[\]\d{4}-\d\d-\d\d", text)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ raise_exception.__code__.co_filename }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
    ],
)
def test_hostile_templates_are_refused(template):
    messages = copy.deepcopy(HELLO)
    with pytest.raises(RequestError, match="sandbox"):
        render(template, messages)
    assert messages == HELLO


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("line\n{% if %}", "syntax error in line 2"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ 'a' + 1 }}", "failed"),
        ("{{ 1 // 0 }}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_template_failures_are_told_in_words(template, words):
    with pytest.raises(RequestError, match=words):
        render(template)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], "message 0"),
        ([*HELLO, {"role": "user"}], "content of chat message 1"),
        ([{"content": "x"}], "role of chat message 0"),
        ([{"role": "user", "content": ["x"]}], "content of chat message 0"),
    ],
)
def test_malformed_messages_are_refused(messages, words):
    with pytest.raises(RequestError, match=words):
        render(HEADER_STYLE, messages)


def test_extra_variables_cannot_replace_the_messages():
    with pytest.raises(RequestError, match="messages"):
        render(HEADER_STYLE, extra={"messages": []})
