"""Options checked where they are made: every field against its declared type and range.

The declaration is the check. A field says its range beside its type, as in
`Annotated[int, Range("from 1 to 64", lambda n: 1 <= n <= 64)]`; `check_fields` in `__post_init__`
does the rest: a value of another type or out of range is refused in one sentence, and what is kept
is plain Python (a list becomes a tuple, a number of numpy or JAX a Python number).

Whole numbers are never taken from floats or text, and booleans are no numbers. Every number fits
what the device computes with: 32 bits, unless its range says more.
"""

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAliasType,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ssd_jax.errors import RequestError, shown

MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
MIN_FLOAT32 = 2.0**-126  # a device takes smaller ones for 0
MAX_ENTRIES = 2**24  # of a list; a longer one is refused
_TEXTS = (str, bytes, bytearray, memoryview)  # sequences that are no lists


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Which values of a type a field takes, in words and as a test.

    Attributes:
        words: after the type's name: "a whole number" + "from 1 to 64".
        holds: whether a value of that type is one of them.
        wide: whether numbers may be ones that the device cannot hold: infinity, or 64 bits.
    """

    words: str
    holds: Callable[[Any], bool]
    wide: bool = False


type TokenId = Annotated[int, Range(f"from 0 to {MAX_INT32}", lambda n: 0 <= n <= MAX_INT32)]
type Probability = Annotated[float, Range("from 0 to 1", lambda p: 0 <= p <= 1)]


def check_fields(options: Any, template: str = "{}") -> None:  # noqa: ANN401 (any dataclass)
    """Refuse the first field that is not as its class declares; keep the others as plain Python.

    `template` makes a field's name what it is called in the sentence.

    Raises:
        RequestError: naming the field, what it takes, and what came.
    """
    hints = _hints(type(options))
    for field in dataclasses.fields(options):
        name, value = field.name, getattr(options, field.name)
        object.__setattr__(options, name, check(template.format(name), value, hints[name]))


def check(name: str, value: object, hint: object) -> Any:  # noqa: ANN401 (a value of that type)
    """The value as the type has it.

    Raises:
        RequestError: it is none of that type, or out of its range.
    """
    kind = _kind(cast("Hashable", hint))
    try:
        return kind.read(value)
    except _Refused as refused:
        part = refused.args[0]
        where = "" if part is value else f" in {shown(value)}"
        raise RequestError(f"{name} must be {kind.words}, got {shown(part)}{where}.") from None


class _Refused(Exception):
    """A value, or the part of it, that does not fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """A type in words, and its values from whatever stands for them (or `_Refused`)."""

    words: str
    read: Callable[[Any], Any]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@functools.cache
def _kind(hint: Any) -> _Kind:  # noqa: ANN401 (types of types are not for annotations)
    """How values of a declared type are told and read."""
    if isinstance(hint, TypeAliasType):
        return _kind(hint.__value__)
    if hint in _PLAIN:
        return _kind_of_plain(hint, None)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind_of_range(*parts)
    if origin in (Union, types.UnionType):
        return _kind_of_union(tuple(map(_kind, parts)))
    if origin is Literal:
        return _kind_of_choice(parts)
    if origin in (tuple, Sequence):
        return _kind_of_list(_kind(parts[0]))
    if origin is Mapping:
        return _kind_of_mapping(_kind(parts[0]), _kind(parts[1]))
    return _kind_of_class(hint)


def _kind_of_range(base: Any, limits: Range) -> _Kind:  # noqa: ANN401
    plain = _kind_of_plain(base, limits) if base in _PLAIN else _kind(base)

    def read(value: object) -> object:
        result = plain.read(value)
        if not limits.holds(result):
            raise _Refused(value)
        return result

    return _Kind(f"{plain.words} {limits.words}", read)


def _kind_of_plain(base: type | None, limits: Range | None) -> _Kind:
    words, read = _PLAIN[base]
    wide = limits is not None and limits.wide
    if base is float and wide:
        words = "a number"
    return _Kind(words, functools.partial(read, wide=wide))


def _kind_of_union(arms: tuple[_Kind, ...]) -> _Kind:
    def read(value: object) -> object:
        parts = []
        for arm in arms:
            try:
                return arm.read(value)
            except _Refused as refused:
                parts.append(refused.args[0])
        # Of a list that may hold this or that, the entry is to blame; of "this or that", the whole.
        inner = [part for part in parts if part is not value]
        raise _Refused(inner[0] if len(inner) == 1 else value)

    return _Kind(" or ".join(arm.words for arm in arms), read)


def _kind_of_choice(choices: tuple[str, ...]) -> _Kind:
    def read(value: object) -> object:
        if not isinstance(value, str) or value not in choices:
            raise _Refused(value)
        return value

    return _Kind(f"one of {', '.join(choices)}", read)


def _kind_of_list(item: _Kind) -> _Kind:
    def read(value: object) -> object:
        entries = _as_python(value)
        if not isinstance(entries, Sequence) or isinstance(entries, _TEXTS):
            raise _Refused(value)
        if not _is_short(entries):
            raise _Refused(value)
        return tuple(map(item.read, entries))

    return _Kind(f"a list of which each is {item.words}", read)


def _kind_of_mapping(key: _Kind, item: _Kind) -> _Kind:
    def read(value: object) -> object:
        if not isinstance(value, Mapping):
            raise _Refused(value)
        return {key.read(name): item.read(entry) for name, entry in value.items()}

    return _Kind(f"a dict whose keys are each {key.words} and whose values {item.words}", read)


def _kind_of_class(cls: type) -> _Kind:
    def read(value: object) -> object:
        if not isinstance(value, cls):
            raise _Refused(value)
        return value

    return _Kind(f"of type {cls.__name__}", read)


def _is_short(entries: Sequence[object]) -> bool:
    """Whether there are few enough entries to look at each (a range may be endless as good as)."""
    try:
        return len(entries) <= MAX_ENTRIES
    except OverflowError:  # of a length that Python has no number for
        return False


def _as_python(value: object) -> object:
    """Numbers and lists of numpy and JAX as Python has them; anything else as it is."""
    if type(value) in (int, float, str, list, tuple) or isinstance(value, memoryview):
        return value
    as_python = getattr(value, "tolist", None)
    return as_python() if callable(as_python) else value


def _read_none(value: object, *, wide: bool) -> None:
    if value is not None:
        raise _Refused(value)


def _read_bool(value: object, *, wide: bool) -> bool:
    result = _as_python(value)
    if not isinstance(result, bool):
        raise _Refused(value)
    return result


def _read_int(value: object, *, wide: bool) -> int:
    result = _as_python(value)
    if not isinstance(result, numbers.Integral) or isinstance(result, bool):
        raise _Refused(value)
    result = int(result)
    if not wide and abs(result) > MAX_INT32:
        raise _Refused(value)
    return result


def _read_float(value: object, *, wide: bool) -> float:
    result = _as_python(value)
    if not isinstance(result, numbers.Real) or isinstance(result, bool):
        raise _Refused(value)
    try:
        result = float(result)
    except OverflowError:
        raise _Refused(value) from None
    fits = abs(result) <= MAX_FLOAT32 or (wide and math.isinf(result))
    if not fits:  # as NaN does not
        raise _Refused(value)
    return result


def _read_text(value: object, *, wide: bool) -> str:
    if not isinstance(value, str):
        raise _Refused(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Refused(value) from None
    return value


_PLAIN: dict[Any, tuple[str, Callable[..., Any]]] = {
    type(None): ("None", _read_none),
    bool: ("True or False", _read_bool),
    int: ("a whole number", _read_int),
    float: ("a finite float32 number", _read_float),
    str: ("a text of whole Unicode characters", _read_text),
}
