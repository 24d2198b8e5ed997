"""JSON objects from files that anybody may have written."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from ssd_jax.errors import CheckpointError, shortened, shown

MAX_DEPTH = 64


def shown_path(path: Path) -> str:
    """The path as a message shows it."""
    return shortened(str(path), 200)


def is_file(path: Path) -> bool:
    """Whether there is a regular file; no for a path that the system cannot look up."""
    return os.path.isfile(path)  # Path.is_file raises for a name that is too long


def is_device(path: Path) -> bool:
    """Whether the path is a device, such as /dev/zero, which may have no end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # there is none, or there can be none
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def read_text(path: Path) -> str:
    """Contents of a UTF-8 text file.

    Raises:
        CheckpointError: no regular file, not readable, or not UTF-8.
    """
    try:
        if os.path.exists(path) and not is_file(path):
            raise OSError("it is not a regular file")  # reading a pipe would wait for ever
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"Expected UTF-8 text in {shown_path(path)}, but it cannot be read "
            f"({shortened(str(error), 200)}); fetch that file again."
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is unreadable, not JSON, nested too deep, or not an object, or a
            field stands in it twice with different values.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_agreeing)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Expected JSON in {shown_path(path)}, but it cannot be read "
            f"({shortened(str(error), 200)}); fetch that file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Expected a JSON object in {shown_path(path)}, got a {type(value).__name__}; "
            "fetch that file again."
        )
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    if level:
        raise CheckpointError(
            f"Expected JSON of at most {MAX_DEPTH} levels in {shown_path(path)}, got more; "
            "fetch that file again."
        )
    return value


def _agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields; readers differ in which of two values of a field they take."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if value != fields[name]:
                raise ValueError(f"the field {shown(name)} stands there twice, with two values")
    return fields
