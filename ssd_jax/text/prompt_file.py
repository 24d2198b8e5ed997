"""Prompts from a file: JSON Lines or a JSON list, gzipped or not, as evaluation sets come."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from ssd_jax.errors import RequestError
from ssd_jax.json_files import is_device

# The fields whose texts, joined by a space, are the prompt; the first that are all there count.
# HumanEval and own files, GSM8K, SVAMP, self-instruct, MT-bench (the first turn), MBPP, UltraChat.
_FIELDS = (
    ("prompt",),
    ("question",),
    ("Body", "Question"),
    ("instruction",),
    ("turns",),
    ("text",),
    ("data",),
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a file, one of each entry: a text, or an object as evaluation sets have them.

    Raises:
        RequestError: the file cannot be read, or naming the first line or entry without a prompt.
    """
    try:
        if is_device(path):
            raise OSError("it is a device")
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read().decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RequestError(
            f"Prompts should be in a readable UTF-8 file, plain or gzipped, but {path} is not "
            f"({error}): name another file."
        ) from error
    prompts = tuple(_prompt_of(entry, where) for entry, where in _entries(content, path))
    if not prompts:
        raise RequestError(f"{path} should hold at least one prompt, got none: name another file.")
    return prompts


def _entries(content: str, path: Path) -> Iterator[tuple[object, str]]:
    """Each entry and where it stands: of a JSON list if the file is one, else each line's."""
    try:
        whole = json.loads(content)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        for number, entry in enumerate(whole, 1):
            yield entry, f"{path}, entry {number}"
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise RequestError(
                f"Each line should be JSON, got {line[:60]!r} ({where}): mend or delete that line."
            ) from error
        yield entry, where


def _prompt_of(entry: object, where: str) -> str:
    if isinstance(entry, str) and entry:
        return entry
    if isinstance(entry, dict):
        for names in _FIELDS:
            if all(name in entry for name in names):
                texts = [text for name in names if (text := _first_text(entry[name]))]
                if len(texts) == len(names):
                    return " ".join(texts)
                break
    known = ", ".join(" + ".join(names) for names in _FIELDS)
    raise RequestError(
        f"Each entry should be a text or an object with one of the fields {known}, which must not "
        f"be empty, got {json.dumps(entry)[:60]} ({where}): mend or delete it."
    )


def _first_text(value: object) -> str | None:
    """The text, or the first of a list of them; None if there is none."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None
