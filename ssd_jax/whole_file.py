"""Writing files that are never half there."""

import os
import tempfile
from pathlib import Path

from ssd_jax.errors import ConfigError
from ssd_jax.json_files import shown_path


def write_whole(path: Path, content: bytes) -> None:
    """Put the content in a file, which is replaced in one go; a link leads to its file.

    Raises:
        ConfigError: the file cannot be written, or is a device, a pipe or a folder.
    """
    temporary = None
    try:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():  # it would be replaced, not written to
            raise ConfigError(f"{shown_path(path)} is no regular file: name one that is, or none.")
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{shown_path(path)} cannot be written ({reason}): name a file that can be."
        ) from error


def _umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
