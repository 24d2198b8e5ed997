"""Making the peers' environments, with tools that are absent, fail, or are stubs."""

import os
import subprocess
import sys

import pytest

from bench.peers import environments
from bench.peers.client import PeerError
from bench.peers.environments import main, make, missing, places

UV = """#!/bin/sh
# uv venv ... ROOT: a Python that runs PIP instead of pip
for root; do :; done
mkdir -p "$root/bin"
printf '#!/bin/sh\\n%s\\n' "$PIP" > "$root/bin/python"
chmod +x "$root/bin/python"
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder of programs, the only ones that can be found besides the shell's."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def add(name, content):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)

    return add


def test_what_is_missing_is_said_with_what_to_do(tmp_path):
    reason = missing("llama.cpp", places(tmp_path))
    assert "llama-server" in reason
    assert "bench.peers.environments llama.cpp" in reason
    for path in (places(tmp_path).llama_server, places(tmp_path).gguf):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    assert missing("llama.cpp", places(tmp_path)) is None


def test_making_an_environment_without_uv_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerError, match="needs uv"):
        make("transformers", tmp_path / "peers")


def test_building_without_a_compiler_says_so_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerError, match=r"no c\+\+ or g\+\+ or clang\+\+: install one"):
        make("llama.cpp", tmp_path / "peers")
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(PeerError, match="there is no my-compiler"):
        make("llama.cpp", tmp_path / "peers")


def test_a_failed_step_is_quoted(tmp_path, tools, capfd):
    tools("uv", "#!/bin/sh\necho no such Python\nexit 3\n")
    with pytest.raises(PeerError, match=r"of Python 3\.11 failed with code 3 .*: no such Python"):
        make("transformers", tmp_path / "peers")
    assert "no such Python" in capfd.readouterr().err


def test_without_a_network_nothing_is_left_half_made(tmp_path, tools, monkeypatch):
    tools("uv", UV)
    monkeypatch.setenv("PIP", "echo No matching distribution; exit 1")
    with pytest.raises(PeerError, match=r"installing torch.*is there a network.*No matching dist"):
        make("transformers", tmp_path / "peers")
    assert list((tmp_path / "peers").iterdir()) == []


def test_an_environment_appears_once_it_is_whole(tmp_path, tools, monkeypatch):
    tools("uv", UV)
    monkeypatch.setenv("PIP", 'echo "$@"')
    for _ in range(2):  # the second takes the place of the first
        make("transformers", tmp_path / "peers", ["--proxy=none"])
    where = places(tmp_path / "peers")
    assert missing("transformers", where) is None
    assert [path.name for path in (tmp_path / "peers").iterdir()] == ["transformers"]
    done = subprocess.run([where.transformers, "is here"], capture_output=True, text=True)
    assert done.stdout == "is here\n"


def test_a_full_disk_is_told(tmp_path, tools, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    tools("uv", UV)
    monkeypatch.setattr(environments.tempfile, "TemporaryDirectory", full)
    with pytest.raises(PeerError, match=r"Making transformers in .* failed: .*No space left"):
        make("transformers", tmp_path / "peers")


def test_the_command_fails_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["environments", "transformers", "--into", str(tmp_path)])
    monkeypatch.setenv("PATH", os.devnull)
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("environments: Making an environment needs uv")
    assert error.count("\n") == 1
