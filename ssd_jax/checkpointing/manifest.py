"""The manifest of a converted checkpoint: what the folder holds and where it came from."""

import dataclasses
import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_jax.checkpointing.safetensors_files import read_json_object
from ssd_jax.config import ModelConfig, RopeScaling
from ssd_jax.errors import CheckpointError, ConfigError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file that weights were read from; `size` in bytes, `sha256` in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredLeaf:
    """A leaf inside the Orbax checkpoint `params/<part>`; `crc32` is that of its bytes."""

    name: str
    part: str
    shape: tuple[int, ...]
    crc32: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a converted checkpoint except the weights themselves.

    `source_config` is the config.json it was made from, `created` a UTC time in ISO 8601.
    """

    config: ModelConfig
    source_config: Mapping[str, Any]
    dtype: str
    num_params: int
    leaves: tuple[StoredLeaf, ...]
    source_files: tuple[SourceFile, ...]
    tokenizer_files: tuple[str, ...]
    tool: str
    created: str
    format_version: int = FORMAT_VERSION


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
        files = tuple(SourceFile(**file) for file in raw["source_files"])
        typed = {"leaves": leaves, "source_files": files, "config": ModelConfig(**config)}
        return Manifest(**dict(raw, tokenizer_files=tuple(raw["tokenizer_files"]), **typed))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"Expected a manifest of ssd-jax in {path}, but it is damaged ({error}); "
            "convert the checkpoint again."
        ) from error
