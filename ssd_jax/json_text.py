"""Writing JSON that every reader takes: it has no infinity and no NaN, so neither have we."""

import json
import math


def to_json(value: object, *, indent: int | None = None) -> str:
    """The value as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
