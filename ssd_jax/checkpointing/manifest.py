"""The manifest of a converted checkpoint: what the folder holds and where it came from."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_jax.config import ModelConfig, RopeScaling
from ssd_jax.errors import CheckpointError, ConfigError
from ssd_jax.json_files import read_json_object

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file that held weights at the time; `size` in bytes, `sha256` in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredLeaf:
    """A leaf inside the Orbax checkpoint `params/<part>`."""

    name: str
    part: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a converted checkpoint except the weights themselves.

    `source_config` is the config.json it was made from, `params_files` are all files that Orbax
    wrote, named by their path inside the params folder; `created` is a UTC time in ISO 8601.
    """

    config: ModelConfig
    source_config: Mapping[str, Any]
    dtype: str
    num_params: int
    leaves: tuple[StoredLeaf, ...]
    params_files: tuple[FileRecord, ...]
    source_files: tuple[FileRecord, ...]
    tokenizer_files: tuple[str, ...]
    tool: str
    created: str
    format_version: int = FORMAT_VERSION


def record_file(path: Path, root: Path) -> FileRecord:
    """Size and hash of a file, named by its path from the root."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.relative_to(root).as_posix()
    return FileRecord(name=name, size=path.stat().st_size, sha256=digest)


def tool_version() -> str:
    """Name and version of this package, as manifests record it."""
    try:
        return f"ssd-jax {importlib.metadata.version('ssd-jax')}"
    except importlib.metadata.PackageNotFoundError:
        return "ssd-jax (not installed)"


def utc_now() -> str:
    """The time now, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest as the text of its file."""
    return json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted checkpoint.

    Raises:
        CheckpointError: it is damaged, or its format is not one this version reads.
    """
    path = folder / MANIFEST_FILE
    raw = read_json_object(path)
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"Expected format version {FORMAT_VERSION} in {path}, got {version!r}; convert the "
            "checkpoint again with this version of ssd-jax, or update ssd-jax."
        )
    try:
        scaling = raw["config"]["rope_scaling"]
        config = dict(raw["config"], rope_scaling=scaling and RopeScaling(**scaling))
        leaves = tuple(
            StoredLeaf(**dict(leaf, shape=tuple(leaf["shape"]))) for leaf in raw["leaves"]
        )
        typed = {
            "config": ModelConfig(**config),
            "leaves": leaves,
            "params_files": tuple(FileRecord(**file) for file in raw["params_files"]),
            "source_files": tuple(FileRecord(**file) for file in raw["source_files"]),
            "tokenizer_files": tuple(raw["tokenizer_files"]),
        }
        return Manifest(**{**raw, **typed})
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"Expected a manifest of ssd-jax in {path}, but it is damaged ({error}); "
            "convert the checkpoint again."
        ) from error
