"""docs/cli.md names every option of every command, and none that is not there."""

import re
from pathlib import Path

import pytest

from ssd_jax.cli.chat_commands import interpret
from ssd_jax.cli.conversation import Conversation
from ssd_jax.cli.main import _COMMANDS, main

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
IN_EVERY_HELP = {"-h", "--help"}


def options_of(command, capsys):
    """Option strings that a command's help lists."""
    assert main([command, "--help"]) == 0
    lines = re.findall(r"^  (-.*?)(?:   ?\S|$)", capsys.readouterr().out, re.MULTILINE)
    names = {part.split()[0] for line in lines for part in line.split(", ") if part.startswith("-")}
    return names - IN_EVERY_HELP


def section(title):
    """The text under a heading, without further headings of its level or above."""
    level = re.search(rf"^(#+) {title}$", DOCS, re.MULTILINE)
    assert level, title
    rest = DOCS[level.end() :]
    end = re.search(rf"^#{{2,{len(level[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def documented(command):
    """The options named in a command's section and in those that it links to."""
    own = section(command)
    links = re.findall(r"\]\(#([a-z-]+)\)", own)
    titles = [link.replace("-", " ").capitalize() for link in links]
    return set(OPTION.findall("\n".join([own, *map(section, titles)])))


@pytest.mark.parametrize("command", _COMMANDS)
def test_each_option_is_in_the_documentation(command, capsys):
    names = documented(command)
    missing = [
        option
        for option in sorted(options_of(command, capsys))
        if option not in names and option.replace("--no-", "--") not in names
    ]
    assert not missing


def test_no_option_is_documented_that_is_not_there(capsys):
    there = set().union(*(options_of(command, capsys) for command in _COMMANDS))
    tables = "\n".join(line for line in DOCS.splitlines() if line.startswith("|"))
    named = {name for cell in re.findall(r"`([^`]*)`", tables) for name in OPTION.findall(cell)}
    assert named - there == set()


def test_each_command_of_the_chat_is_in_the_documentation():
    note = interpret(Conversation(), "/help").note
    commands = {line.split()[0] for line in note.splitlines() if line.startswith("/")}
    assert {name for name in commands if f"`{name}" not in section("chat")} == set()
