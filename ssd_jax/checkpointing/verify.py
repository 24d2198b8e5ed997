"""Whether a converted checkpoint is still what was written, byte for byte.

Loading looks at names and sizes alone: hashing the weights of a large model takes minutes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from ssd_jax.checkpointing.manifest import MANIFEST_FILE, FileRecord, read_manifest, record_file
from ssd_jax.checkpointing.orbax_io import PARAMS_FOLDER
from ssd_jax.errors import CheckpointError, shortened
from ssd_jax.json_files import is_file, shown_path

_MAX_LISTED = 5


def verify_checkpoint(
    folder: Path, progress: Callable[[str, int, int], None] | None = None
) -> tuple[int, int]:
    """How many files were found unchanged, and their bytes: weights and tokenizer files.

    `progress` is called with what is being done, the bytes done and the bytes to do.

    Raises:
        CheckpointError: no converted checkpoint, or the files that are absent or have changed.
    """
    if not is_file(folder / MANIFEST_FILE):
        raise CheckpointError(
            f"Expected a folder that `ssd-jax convert` wrote, as only those record hashes, got "
            f"{shown_path(folder)} without a {MANIFEST_FILE}; convert the checkpoint first."
        )
    manifest = read_manifest(folder)
    files = [(folder / PARAMS_FOLDER, record) for record in manifest.params_files]
    files += [(folder, record) for record in manifest.tokenizer_files]
    total, done, changed = sum(record.size for _, record in files), 0, []
    for root, record in files:
        if progress is not None:
            progress("verifying", done, total)
        changed += [f"{record.name} {what}" for what in _changes(root, record)]
        done += record.size
    if progress is not None:
        progress("verifying", done, total)
    if changed:
        more = f" and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
        listed = ", ".join(shortened(entry, 100) for entry in changed[:_MAX_LISTED])
        raise CheckpointError(
            f"Expected the files of {shown_path(folder)} to be those that were written, but "
            f"{listed}{more}; convert the checkpoint again."
        )
    return len(files), total


def _changes(root: Path, record: FileRecord) -> Iterator[str]:
    """What is not as recorded, in words."""
    path = root / record.name
    if not is_file(path):
        yield "is absent"
        return
    try:
        now = record_file(path, root)
    except OSError as error:
        yield f"cannot be read ({error.strerror})"
        return
    if now.size != record.size:
        yield f"has {now.size} bytes instead of {record.size}"
    elif now != record:
        yield "has other contents"
