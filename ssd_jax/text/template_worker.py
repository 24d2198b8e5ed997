"""The program that renders chat templates, in a process of its own (see `template_process.py`).

It reads JSON objects from stdin, one a line: {"template", "variables", "max_seconds", "max_chars",
"max_bytes"}. For each it writes one to stdout: {"text"}, or {"kind", "reason"} where kind is
"syntax", "forbidden" or "failed"; "ended" beside them says that it should be started anew. It ends
with its stdin, or with its parent.
"""

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # not on every system
    resource = None


_MAX_GROWTH = 2**26  # bytes that a rendering may leave behind, of the room of the next
_PATIENCE_S = 5  # between two looks for the parent, and for a parent to end what takes too long


def main() -> None:
    """Answer the requests on stdin."""
    for line in _lines():
        sys.stdout.write(json.dumps(_limited_answer(line)) + "\n")
        sys.stdout.flush()


def _lines() -> Iterator[bytes]:
    """The requests, until stdin is closed or the parent is gone.

    A fork of the parent may hold stdin open after it.
    """
    parent = os.getppid()
    while True:
        if os.name == "posix":
            while not select.select([sys.stdin], [], [], _PATIENCE_S)[0]:
                if os.getppid() != parent:
                    return
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            return
        yield line


def _limited_answer(line: bytes) -> dict[str, Any]:
    """The answer to a request, within its limits of memory and, should nobody kill us, time."""
    before = _address_space()
    try:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):  # ends the process, within C code too
            signal.setitimer(signal.ITIMER_REAL, request["max_seconds"] + _PATIENCE_S)
        if resource is not None:
            with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
                resource.setrlimit(resource.RLIMIT_AS, (request["max_bytes"],) * 2)
        answer = _answer(request)
    except MemoryError:
        return {"kind": "failed", "reason": "it needs too much memory", "ended": True}
    except RecursionError:
        return {"kind": "failed", "reason": "it is nested too deeply", "ended": True}
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    # Freed memory may stay with us in pieces: the next rendering shall have as much room.
    return {**answer, "ended": _address_space() > before + _MAX_GROWTH}


def _address_space() -> int:
    """Bytes of this process that its limit counts; 0 if the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[0]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _answer(request: dict[str, Any]) -> dict[str, str]:
    """The text, or why there is none."""
    try:
        environment = _environment(_contents(request["variables"]["messages"]))
        text = environment.from_string(request["template"]).render(request["variables"])
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "reason": f"line {error.lineno} ({error.message})"}
    except SecurityError as error:
        return {"kind": "forbidden", "reason": str(error)}
    except MemoryError:
        return {"kind": "failed", "reason": "it needs too much memory"}
    except Exception as error:  # a template is a program, it can raise anything
        return {"kind": "failed", "reason": str(error) or type(error).__name__}
    if len(text) > request["max_chars"]:
        return {"kind": "failed", "reason": f"it wrote {len(text)} characters, which is too long"}
    return {"text": text}


def _contents(messages: list[dict[str, Any]]) -> list[object]:
    """The contents of messages that are not text, which a template may not know how to write."""
    contents = [message.get("content", "") for message in messages]
    return [content for content in contents if not isinstance(content, str)]


def _environment(contents: list[object]) -> ImmutableSandboxedEnvironment:
    """Sandbox with the settings and names that Hugging Face templates rely on.

    Jinja writes null and lists as Python does; a template that would do that to a message's content
    was made for text only, and fails.
    """

    def check(value: object) -> object:
        if any(value is content for content in contents):
            what = "null" if value is None else "a list of parts"
            raise jinja2.TemplateError(f"it takes text only as content, not {what}")
        return value

    def trim(value: object, chars: str | None = None) -> str:
        return str(check(value)).strip(chars)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        **({"finalize": check} if contents else {}),
    )
    environment.filters["tojson"] = _to_json
    if contents:
        environment.filters |= {"trim": trim, "string": lambda value: str(check(value))}
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


if __name__ == "__main__":
    main()
