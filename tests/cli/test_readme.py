"""What README prints works as printed: every command is understood, and in the long run typed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_jax.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DEMO = ROOT / "checkpoints" / "demo"
# The models that the commands name, and what stands in for them.
STAND_INS = {
    "Qwen/Qwen3-0.6B": "target",
    "path/to/Qwen3-8B": "target",
    "path/to/Qwen3-0.6B": "draft",
    "path/to/Llama-3.2-1B": "target",
    "path/to/target": "target",
    "path/to/draft": "draft",
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def _commands():
    """The indented lines that type `ssd-jax`, without what installs it."""
    lines = re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)
    lines = [line.removeprefix("pip install uv && ").removeprefix("uv run ") for line in lines]
    return [line for line in lines if re.search(r"(^|\| )ssd-jax ", line)]


def _snippets():
    return re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _arguments(command):
    words = shlex.split(command, comments=True)
    return words[words.index("ssd-jax") + 1 :]


def test_the_readme_has_commands_and_snippets():
    assert len(_commands()) >= 10
    assert len(_snippets()) >= 2


@pytest.mark.parametrize("command", _commands())
def test_the_command_line_understands_each_command(command, capsys):
    """A flag that does not exist is the first thing that is wrong with it."""
    assert main([*_arguments(command), "--no-such-flag"]) == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the names of README's models are folders."""
    place = tmp_path_factory.mktemp("readme")
    for name, model in STAND_INS.items():
        shutil.copytree(DEMO / model, place / name)
        (place / name / "chat_template.jinja").write_text(TEMPLATE)
    return place


def _run(argv, place, **options):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        argv,
        cwd=place,
        env={**os.environ, "PATH": paths, "JAX_PLATFORMS": "cpu"},
        text=True,
        capture_output=True,
        timeout=600,
        **options,
    )


@pytest.mark.slow
def test_each_command_runs_as_printed(place):
    for command in _commands():  # in order: one makes what the next reads
        if _arguments(command)[0] == "bench":
            continue  # minutes each; tests/unit/test_bench_* run their parts
        done = _run(["bash", "-c", command], place, input="Hello\n")
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip(), command
        assert "Traceback" not in done.stderr, command


@pytest.mark.slow
@pytest.mark.parametrize("snippet", _snippets())
def test_each_snippet_runs_alone(place, snippet):
    done = _run([sys.executable, "-c", snippet], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
