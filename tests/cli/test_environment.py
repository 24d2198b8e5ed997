from pathlib import Path

import jax
import pytest

from ssd_jax.cli.environment import cache_folder, unwritable_reason, use_compilation_cache


@pytest.mark.parametrize(
    ("choice", "environment", "platform", "expected"),
    [
        (None, {"HOME": "/h"}, "linux", Path("/h/.cache/ssd-jax/xla")),
        (None, {"HOME": "/h"}, "darwin", Path("/h/Library/Caches/ssd-jax/xla")),
        (None, {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "linux", Path("/x/ssd-jax/xla")),
        (
            None,
            {"HOME": "/h", "XDG_CACHE_HOME": "/x", "JAX_COMPILATION_CACHE_DIR": "/j"},
            "linux",
            Path("/j"),
        ),
        ("/c", {"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/j"}, "linux", Path("/c")),
        ("off", {"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/j"}, "linux", None),
    ],
)
def test_cache_folder_takes_the_first_that_is_set(choice, environment, platform, expected):
    assert cache_folder(choice, environment, platform) == expected


def test_unwritable_reason_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    folder = tmp_path / "a" / "b"
    assert unwritable_reason(folder) is None
    assert list(folder.iterdir()) == []


def test_cache_keeps_every_program(tmp_path, jax_settings, capsys):
    use_compilation_cache(str(tmp_path))
    assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes <= 0
    assert capsys.readouterr() == ("", "")


def test_cache_off_wins_over_a_folder_that_jax_has(tmp_path, jax_settings):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    use_compilation_cache("off")
    assert not jax.config.jax_enable_compilation_cache


def test_generate_goes_on_without_a_writable_cache(generate, tmp_path):
    (tmp_path / "file").touch()
    outcome = generate("the cat", "--quiet", "--compilation-cache", tmp_path / "file" / "cache")
    assert outcome.code == 0
    assert len(outcome.out) > 1
    assert outcome.err.startswith("ssd-jax: warning:")
    assert str(tmp_path / "file" / "cache") in outcome.err
