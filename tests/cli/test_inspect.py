"""`ssd-jax inspect`, and what --verify adds."""

import pytest

from ssd_jax.checkpointing import convert


@pytest.fixture
def converted(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint, tmp_path / "out")
    return tmp_path / "out"


def test_verify_says_how_much_it_read(run, converted):
    outcome = run("inspect", converted, "--verify")
    assert outcome.code == 0
    assert "parameters" in outcome.out
    assert outcome.out.endswith("all as they were written\n")
    assert "verified" not in run("inspect", converted).out


def test_verify_finds_a_flipped_byte_that_loading_does_not_look_for(run, converted):
    path = max((converted / "params").rglob("*"), key=lambda path: path.stat().st_size)
    contents = path.read_bytes()
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    assert run("inspect", converted).code == 0
    outcome = run("inspect", converted, "--verify")
    assert outcome.code == 2
    assert f"{path.name} has other contents" in outcome.err
    assert outcome.out == ""


def test_verify_of_a_hugging_face_folder_is_refused(run, tiny_checkpoint):
    outcome = run("inspect", tiny_checkpoint, "--verify")
    assert outcome.code == 2
    assert "convert the checkpoint first" in outcome.err
