"""The benchmarks' command lines, read as those of the other subcommands are."""

import argparse
import os
from collections.abc import Sequence

from ssd_jax.cli.parser import Parser, bind_variables, fill_in


def make_parser(tool: str, description: str) -> Parser:
    """A parser for `ssd-jax bench TOOL`."""
    return Parser(prog=f"ssd-jax bench {tool}", description=description, allow_abbrev=False)


def read_arguments(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; flags that are left out come from the environment or are their defaults."""
    flags = bind_variables(parser)
    return fill_in(parser.parse_args(argv), flags, os.environ)
