"""A conversion killed at its stages, and at each call that renames or removes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssd_jax.checkpointing import convert, load_checkpoint
from ssd_jax.checkpointing.leaves import leaves_of
from ssd_jax.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OLD, NEW = FIXTURES / "llama", FIXTURES / "qwen3"
MODES = ("fresh", "exchange", "two_steps")

# Each child is killed before its n-th call, that is, after the one before. Forks before jax has
# started any thread, and prints the n that were reached.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import orbax.checkpoint
from ssd_jax.checkpointing import convert, partial_folder
from ssd_jax.checkpointing.exchange import exchange_names

source, folder, mode, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
calls = []

def count(place):
    calls.append(place)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, arguments):
    if event in ("os.rename", "os.remove", "os.rmdir"):
        count(event)

def exchange(one, other):
    count("exchange")
    return exchange_names(one, other) if mode == "exchange" else False

number = 0
sys.addaudithook(hook)
partial_folder.exchange_names = exchange
for name in map(int, wanted):
    child = os.fork()
    if child == 0:
        number = name
        convert(source, folder / str(name) / "out", overwrite=mode != "fresh")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    print(name)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A converted checkpoint that is to be replaced."""
    folder = tmp_path_factory.mktemp("old") / "out"
    convert(OLD, folder)
    return folder


def leaves_in(folder):
    leaves = leaves_of(load_checkpoint(folder).params)
    return {name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()}


def unfinished(folder):
    return [path.name for path in folder.glob(".*.partial-*")]


def check_kills(mode, numbers, tmp_path, old_checkpoint):
    """Kill a run before each of its calls of those numbers, and look at what is left.

    How many of them a run comes to is the result.
    """
    before, after = leaves_in(OLD), leaves_in(NEW)
    for number in numbers:
        (tmp_path / str(number)).mkdir()
        if mode != "fresh":
            shutil.copytree(old_checkpoint, tmp_path / str(number) / "out")
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, NEW, tmp_path, mode, *numbers]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True)
    reached = [int(number) for number in done.stdout.split()]
    for number in reached:
        folder = tmp_path / str(number)
        destination = folder / "out"
        kept = [destination] if destination.exists() else list(folder.glob(".out.replaced-*"))
        assert len(kept) == (mode != "fresh" or destination.exists()), number
        for whole in kept:
            assert leaves_in(whole) in (before, after), number
        if mode != "fresh":  # a run that fails leaves a whole one in its place as well
            with pytest.raises(CheckpointError, match="found none"):
                convert(folder / "nowhere", destination, overwrite=True)
            assert leaves_in(destination) in (before, after), number
        convert(NEW, destination, overwrite=destination.exists())
        assert leaves_in(destination) == after, number
        assert [path.name for path in folder.iterdir()] == ["out"], number

    return len(reached)


# Orbax removes two files and renames a folder first; then come the exchange or the renames.
CLOSEST = {"fresh": (3, 4), "exchange": (4, 5, 12), "two_steps": (5, 6, 7, 8, 14)}


@pytest.mark.parametrize("mode", MODES)
def test_killed_where_names_change(mode, tmp_path, old):
    assert check_kills(mode, CLOSEST[mode], tmp_path, old) == len(CLOSEST[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_call(mode, tmp_path, old):
    most = 100
    assert CLOSEST[mode][-1] <= check_kills(mode, range(1, most), tmp_path, old) < most - 1


# Forks a child for every point before jax has started any thread; each child dies by SIGKILL there.
STAGES = """
import os, signal, sys
from pathlib import Path
import orbax.checkpoint
import ssd_jax.checkpointing as checkpointing
from ssd_jax.checkpointing import converter, orbax_io, partial_folder

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
orbax_io.PART_BYTES = 50_000
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def at(stage, count):
    calls = []
    def progress(name, done, total):
        calls.append(name)
        if calls.count(stage) == count:
            die()
    return lambda: progress

def patched(module, name):
    def patch():
        setattr(module, name, die)
    return patch

points = {
    "hashing": at("hashing", 1),
    "first_leaf": at("converting", 2),
    "later_leaf": at("converting", 9),
    "verifying": at("verifying", 3),
    "manifest": patched(converter, "write_synced"),
    "swap": patched(partial_folder, "_put_in_place"),
    "rename_in_orbax": patched(os, "rename"),
}
for name, arm in points.items():
    child = os.fork()
    if child == 0:
        checkpointing.convert(source, folder / name, progress=arm())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(name, os.WIFSIGNALED(status) and os.WTERMSIG(status))
"""


def test_killed_runs_leave_nothing_that_loads_and_a_rerun_completes(tmp_path):
    source = FIXTURES / "llama31"
    command = [sys.executable, "-W", "ignore", "-c", STAGES, str(source), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    outcomes = dict(line.split() for line in done.stdout.splitlines())
    assert len(outcomes) == 7
    assert set(outcomes.values()) == {"9"}, done.stderr
    leftovers = unfinished(tmp_path)
    assert len(leftovers) == 7
    for name in outcomes:
        with pytest.raises(CheckpointError, match="found none"):
            load_checkpoint(tmp_path / name)
    for name in leftovers:
        if ".swap." not in name:  # there it was complete and only its name is missing
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path / name)
    for name in ("first_leaf", "swap"):
        convert(source, tmp_path / name)
        assert leaves_in(tmp_path / name) == leaves_in(source)
        assert not any(f".{name}." in other for other in unfinished(tmp_path))
