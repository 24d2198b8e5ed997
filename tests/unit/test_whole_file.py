import os

import pytest

from ssd_jax.errors import ConfigError
from ssd_jax.whole_file import write_whole


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ConfigError, match="no regular file"):
            write_whole(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "no/such/folder/x"])
def test_names_that_no_file_can_have_are_told(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        write_whole(tmp_path / name, b"new")
    assert len(str(caught.value)) < 400
