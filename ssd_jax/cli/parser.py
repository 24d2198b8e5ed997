"""argparse as this command line needs it: one-sentence errors, each flag also a variable."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ssd_jax.errors import SsdJaxError, shortened

_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


class UsageError(SsdJaxError):
    """A command line or an environment variable that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UsageError(f"{shortened(message.rstrip('.'), 400)} (see `{self.prog} --help`).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of a parser: its variable, and the value it has when neither of them is set."""

    action: argparse.Action
    variable: str
    default: object


def bind_variables(parser: argparse.ArgumentParser) -> tuple[Flag, ...]:
    """The parser's flags, after their help names their variables and their defaults are taken out.

    Of several flags with one destination only the first has the variable.
    """
    flags: dict[str, Flag] = {}
    for action in parser._actions:
        if action.dest == "help" or not action.option_strings:
            continue
        if action.dest not in flags:
            variable = f"SSD_JAX_{action.dest.upper()}"
            flags[action.dest] = Flag(action=action, variable=variable, default=action.default)
            action.help = f"{action.help} [{variable}]"
        action.default = argparse.SUPPRESS
    return tuple(flags.values())


def fill_in(
    args: argparse.Namespace, flags: Sequence[Flag], environment: Mapping[str, str]
) -> argparse.Namespace:
    """The arguments, flags that the command line left out taken from the environment or defaults.

    An empty variable counts as unset. A flag that takes several values takes a JSON list of them.

    Raises:
        UsageError: a variable has a value that its flag does not accept.
    """
    values = vars(args).copy()
    for flag in flags:
        if flag.action.dest in values:
            continue
        text = environment.get(flag.variable, "")
        values[flag.action.dest] = _read(flag, text) if text else flag.default
    return argparse.Namespace(**values)


def whole_number(text: str) -> int:
    """The integer that a text spells."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error


def number(text: str) -> float:
    """The number that a text spells."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from error


def _read(flag: Flag, text: str) -> object:
    """The value of a variable, converted as its flag converts."""
    try:
        if flag.action.nargs == 0:
            return _boolean(text)
        if isinstance(flag.default, tuple):
            return [_convert(flag.action, entry) for entry in _entries(text)]
        return _convert(flag.action, text)
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        reason = shortened(str(error).rstrip("."), 400)
        raise UsageError(f"environment variable {flag.variable}: {reason}.") from error


def _boolean(text: str) -> bool:
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(_BOOLEANS)}, got {text!r}")
    return value


def _entries(text: str) -> list[str]:
    """The entries of a JSON list; any other text is one entry."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return [text]
    return [str(entry) for entry in value] if isinstance(value, list) else [text]


def _convert(action: argparse.Action, text: str) -> object:
    value = action.type(text) if callable(action.type) else text
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise argparse.ArgumentTypeError(f"expected one of {choices}, got {text!r}")
    return value
