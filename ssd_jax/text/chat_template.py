"""Chat templates: messages to prompt text, in the dialect that Hugging Face checkpoints use."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ssd_jax.errors import RequestError, shortened, shown
from ssd_jax.text.template_process import TemplateProcess

MAX_SECONDS = 20
MAX_CHARS = 2**24
MAX_BYTES = 2**30


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
    process: TemplateProcess | None = None,
) -> str:
    """Prompt text of a conversation.

    The template is untrusted: it runs in jinja2's immutable sandbox, which keeps it from Python's
    internals and from changing the messages, in a process of its own, whose time, memory and text
    are bounded: one filter can ask C code for gigabytes. Starting that takes about a tenth of a
    second; give a `process` to have it only once.

    `special_tokens` are the names and texts that the tokenizer's files give; without them
    bos_token and eos_token are empty. `extra` holds further variables, such as enable_thinking.

    Raises:
        RequestError: malformed messages, an `extra` name that is taken, or any failure of the
            template.
    """
    _check_messages(messages)
    variables = {
        "bos_token": "",
        "eos_token": "",
        **special_tokens,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
    }
    taken = sorted(variables.keys() & (extra or {}).keys())
    if taken:
        raise RequestError(
            f"Expected extra chat template variables with names of their own, got {taken}; "
            "set those through their own options."
        )
    request = _as_request(template, {**variables, **(extra or {})})
    if process is None:
        with contextlib.closing(TemplateProcess()) as process:
            answer = process.ask(request, MAX_SECONDS)
    else:
        answer = process.ask(request, MAX_SECONDS)
    if "text" in answer:
        return answer["text"]
    reason = shortened(answer["reason"], 300)
    if answer["kind"] == "syntax":
        raise RequestError(
            f"Expected a valid chat template, got a syntax error in {reason}; correct the template."
        )
    if answer["kind"] == "forbidden":
        raise RequestError(
            "Expected a chat template that stays within its sandbox, got a forbidden access "
            f"({reason}); do not use this template."
        )
    raise RequestError(
        f"Expected messages that the chat template accepts, but it failed ({reason}); "
        "change the messages or the template."
    )


def _as_request(template: str, variables: Mapping[str, Any]) -> str:
    """The line that `template_worker.py` reads."""
    limits = {"max_seconds": MAX_SECONDS, "max_chars": MAX_CHARS, "max_bytes": MAX_BYTES}
    try:
        return json.dumps({"template": template, "variables": variables, **limits}, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            "Expected messages, tools and variables that can be written as JSON, but that failed "
            f"({shortened(str(error), 200)}); send texts, numbers, lists and objects."
        ) from error


def _plain(value: object) -> object:
    """The value as something that JSON knows."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a {type(value).__name__} is among them")


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse anything but a non-empty sequence of mappings with a role and a content.

    Content is text or a list of parts; beside other fields, such as tool calls, it may be absent.
    """
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
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise RequestError(
                f"Expected role of chat message {index} to be text, got {shown(role)}; send text."
            )
        is_parts = isinstance(content, list | tuple) and all(
            isinstance(part, Mapping) for part in content
        )
        is_absent = content is None and len(message.keys() - {"role", "content"}) > 0
        if not isinstance(content, str) and not is_parts and not is_absent:
            raise RequestError(
                f"Expected content of chat message {index} to be text or a list of parts, "
                f"got {shown(content)}; send text."
            )
