"""Folders in the user's cache, and what is set in JAX before the first program is compiled."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

OFF = "off"


def cache_folder(
    choice: str | None, environment: Mapping[str, str], platform: str = sys.platform
) -> Path | None:
    """Where compiled programs are kept, None for nowhere.

    The first that is set: `choice` (a folder or "off"), JAX's own variable, the user's cache folder
    as the platform has it.
    """
    if choice is not None:
        return None if choice == OFF else Path(choice).expanduser()
    if folder := environment.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(folder)
    return user_cache(environment, platform) / "xla"


def user_cache(environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """This program's folder in the user's cache folder, where the platform has that."""
    if folder := environment.get("XDG_CACHE_HOME"):
        return Path(folder) / "ssd-jax"
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    caches = home / "Library" / "Caches" if platform == "darwin" else home / ".cache"
    return caches / "ssd-jax"


def unwritable_reason(folder: Path) -> str | None:
    """Why no file can be made in a folder (which is made if need be), None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def use_compilation_cache(choice: str | None) -> None:
    """Let JAX keep every program it compiles, however small or quickly made.

    A folder that cannot be written is reported on stderr, and nothing is kept.
    """
    import jax

    folder = cache_folder(choice, os.environ)
    if folder is not None and (reason := unwritable_reason(folder)):
        print(
            f"ssd-jax: warning: compiled programs cannot be kept in {folder} ({reason}); name "
            "another folder with --compilation-cache.",
            file=sys.stderr,
        )
        folder = None
    jax.config.update("jax_enable_compilation_cache", folder is not None)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
