"""Chat templates: messages to prompt text, in the dialect that Hugging Face checkpoints use."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ssd_jax.errors import RequestError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None,
    eos_token: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Prompt text of a conversation.

    The template is untrusted: it runs in jinja2's immutable sandbox, which keeps it from Python's
    internals and from changing the messages, but does not bound its time or memory. A token that
    is None appears as an empty text. `extra` holds further variables, such as enable_thinking.

    Raises:
        RequestError: malformed messages, an `extra` name that is taken, or any failure of the
            template.
    """
    _check_messages(messages)
    variables = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
        "tools": tools,
    }
    taken = sorted(variables.keys() & (extra or {}).keys())
    if taken:
        raise RequestError(
            f"Expected extra chat template variables with names of their own, got {taken}; "
            "set those through their own options."
        )
    try:
        return _environment().from_string(template).render({**variables, **(extra or {})})
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"Expected a valid chat template, got a syntax error in line {error.lineno} "
            f"({error.message}); correct the template."
        ) from error
    except SecurityError as error:
        raise RequestError(
            f"Expected a chat template that stays within its sandbox, got a forbidden access "
            f"({error}); do not use this template."
        ) from error
    except Exception as error:  # a template is a program, it can raise anything
        reason = str(error) or type(error).__name__
        raise RequestError(
            f"Expected messages that the chat template accepts, but it failed ({reason}); "
            "change the messages or the template."
        ) from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse anything but a non-empty sequence of mappings with text under role and content."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            "Expected a non-empty list of chat messages, "
            f"got {messages if messages == [] else type(messages).__name__}; "
            'send at least one {"role": ..., "content": ...}.'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"Expected chat message {index} to be an object with role and content, "
                f"got a {type(message).__name__}; send both."
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(
                    f"Expected {key} of chat message {index} to be text, "
                    f"got {message.get(key)!r}; send text."
                )


def _environment() -> ImmutableSandboxedEnvironment:
    """Sandbox with the settings and names that Hugging Face templates rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """Lets `{% generation %}...{% endgeneration %}`, a mark for training, pass its body through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        """Node of the block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON text without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> NoReturn:
    """Let a template refuse a conversation in its own words."""
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    """Local time in the given pattern."""
    return datetime.now().strftime(pattern)
