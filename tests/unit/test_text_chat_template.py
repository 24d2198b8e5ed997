import copy
import re

import pytest

from ssd_jax.errors import RequestError
from ssd_jax.text import chat_template, render_chat

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
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return render_chat(template, messages, special_tokens=tokens, **options)


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
    text = render_chat(template, HELLO, special_tokens={})
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


def test_special_tokens_are_variables():
    tokens = {"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]}
    template = "{{ pad_token }}{{ additional_special_tokens[1] }}{{ unk_token is defined }}"
    assert render_chat(template, HELLO, special_tokens=tokens) == "<pad><b>False"


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "tide"}}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
TAKES_BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
)


def test_content_may_be_null_or_parts_where_the_template_takes_it():
    assert render(TAKES_BOTH, [PARTS, CALL]) == 'Hi[{"function": {"name": "tide"}}]'
    assert render(TAKES_BOTH, [{k: v for k, v in CALL.items() if k != "content"}]).startswith("[")
    assert render("{{ messages[0].content or 'none' }}", [CALL]) == "none"


@pytest.mark.parametrize("message", [CALL, PARTS])
@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}", "{{ messages[0]['content'] | trim }}", "{{ 'x' + m.content }}"],
)
def test_content_that_the_template_would_write_as_python_is_refused(template, message):
    with pytest.raises(RequestError, match=r"content|concatenate"):
        render("{% set m = messages[0] %}" + template, [message])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson(indent='x' * 10**8) }}",
        "{{ messages | batch(10**9, 'x') | list | string | length }}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x' * 10**8 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    ],
)
def test_time_memory_and_text_of_a_template_are_bounded(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 3)
    with pytest.raises(RequestError, match=r"failed \((it|Range too big)") as caught:
        render(template)
    assert len(str(caught.value)) < 600


def test_what_is_no_json_is_refused():
    with pytest.raises(RequestError, match="a set is among them"):
        render("{{ x }}", extra={"x": {1}})


def test_lone_surrogates_pass_through():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "\udcff"}]) == "\udcff"
