"""The manifest of a converted checkpoint: what the folder holds and where it came from.

It decides the maths, so it vouches for itself: `sha256` is of all its other fields. Every field is
read as its class declares it, and nothing else is taken.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from ssd_jax.checkpointing.leaves import leaf_shapes
from ssd_jax.config import ModelConfig, RopeScaling
from ssd_jax.errors import CheckpointError, ConfigError, RequestError, shortened, shown
from ssd_jax.field_checks import Range, check
from ssd_jax.json_files import read_json_object, shown_path

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
_MOST_LEAVES = 10**6
_HASH_FIELD = "sha256"

type FileName = Annotated[str, Range("that is a path inside its folder", lambda n: _is_inside(n))]
type PartName = Annotated[
    str, Range("of five digits or more", lambda n: bool(re.fullmatch(r"[0-9]{5,9}", n)))
]
type Size = Annotated[int, Range("from 0 on", lambda n: 0 <= n < 2**63, wide=True)]
type Hash = Annotated[
    str, Range("of 64 hexadecimal digits", lambda n: bool(re.fullmatch(r"[0-9a-f]{64}", n)))
]
type WeightDtype = Annotated[
    str, Range("that is float32 or bfloat16", lambda n: n in ("float32", "bfloat16"))
]
type Count = Annotated[int, Range("above 0", lambda n: 0 < n < 2**63, wide=True)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file as it was when it was written or read; `size` in bytes."""

    name: FileName
    size: Size
    sha256: Hash


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredLeaf:
    """A leaf inside the Orbax checkpoint `params/<part>`."""

    name: str
    part: PartName
    shape: tuple[Count, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a converted checkpoint except the weights themselves.

    `source_config` is the config.json it was made from, `params_files` are all files that Orbax
    wrote, named by their path inside the params folder, `tokenizer_files` those copied beside it;
    `created` is a UTC time in ISO 8601.
    """

    config: ModelConfig
    source_config: Mapping[str, Any]
    dtype: WeightDtype
    num_params: Count
    leaves: tuple[StoredLeaf, ...]
    params_files: tuple[FileRecord, ...]
    source_files: tuple[FileRecord, ...]
    tokenizer_files: tuple[FileRecord, ...]
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
    fields = dataclasses.asdict(manifest)
    return json.dumps(fields | {_HASH_FIELD: _hash_of(fields)}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted checkpoint.

    Raises:
        CheckpointError: it is damaged or was edited, contradicts itself, or its format is not one
            that this version reads.
    """
    path = folder / MANIFEST_FILE
    raw = read_json_object(path)
    version = raw.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool | float):
        raise CheckpointError(
            f"Expected format version {FORMAT_VERSION} in {shown_path(path)}, got "
            f"{shown(version)}; convert the checkpoint again with this version of ssd-jax, or "
            "update ssd-jax."
        )
    stated = raw.pop(_HASH_FIELD, None)
    if stated != _hash_of(raw):
        raise CheckpointError(
            f"Expected {shown_path(path)} to be as `ssd-jax convert` wrote it, but its contents do "
            "not have the hash that it states; convert the checkpoint again rather than edit it."
        )
    try:
        manifest = _manifest_from(raw)
        _check_sense(manifest)
    except (_Senseless, ConfigError, RequestError) as error:
        raise CheckpointError(
            f"Expected a manifest of ssd-jax in {shown_path(path)}, but it is damaged "
            f"({shortened(str(error).rstrip('.'), 200)}); convert the checkpoint again."
        ) from error
    return manifest


class _Senseless(Exception):
    """What a manifest says cannot be, in words."""


def _hash_of(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields as JSON in one spelling, in hexadecimal."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_from(raw: Mapping[str, Any]) -> Manifest:
    """The manifest with every field of its declared type."""
    fields = dict(raw)
    config = fields.get("config")
    if isinstance(config, dict) and config.get("rope_scaling") is not None:
        config = config | {"rope_scaling": _record(RopeScaling, config["rope_scaling"])}
    if not isinstance(fields.get("source_config"), dict):
        raise _Senseless(f"source_config must be an object, got {shown(raw.get('source_config'))}")
    fields["config"] = _record(ModelConfig, config)
    fields["leaves"] = _records(StoredLeaf, fields.get("leaves"))
    for name in ("params_files", "source_files", "tokenizer_files"):
        fields[name] = _records(FileRecord, fields.get(name))
    return _record(Manifest, fields, unchecked=("source_config",))


def _records[T](cls: type[T], raw: object) -> tuple[T, ...]:
    if not isinstance(raw, list) or len(raw) > _MOST_LEAVES:
        raise _Senseless(f"expected a list of {cls.__name__}, got {shown(raw)}")
    return tuple(_record(cls, entry) for entry in raw)


def _record[T](cls: type[T], raw: object, unchecked: tuple[str, ...] = ()) -> T:
    """An instance from an object with exactly the fields of the class."""
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    if not isinstance(raw, dict) or raw.keys() != set(names):
        raise _Senseless(f"expected a {cls.__name__} with all its fields, got {shown(raw)}")
    return cls(
        **{
            name: raw[name] if name in unchecked else check(name, raw[name], hints[name])
            for name in names
        }
    )


def _check_sense(manifest: Manifest) -> None:
    """Raise unless the leaves are those of the configuration, and lie in files that are listed."""
    leaves = {leaf.name: leaf.shape for leaf in manifest.leaves}
    count = sum(math.prod(shape) for shape in leaves.values())
    # Counted first: a table of all layers is only built if the manifest itself is as long.
    if (
        manifest.config.num_layers > len(leaves)
        or len(leaves) != len(manifest.leaves)
        or leaves != leaf_shapes(manifest.config)
        or not manifest.num_params == count == manifest.config.num_params
    ):
        raise _Senseless("its leaves are not those of its own configuration")
    names = [file.name for file in manifest.params_files]
    if len(set(names)) != len(names):
        raise _Senseless("it lists a file twice")
    parts = {leaf.part for leaf in manifest.leaves}
    if parts != {name.partition("/")[0] for name in names} or parts & set(names):
        raise _Senseless("the files that it lists are not those of the parts of its leaves")
    for file in (*manifest.tokenizer_files, *manifest.source_files):
        if "/" in file.name:
            raise _Senseless(f"it names {shown(file.name)} beside the weights")


def _is_inside(name: str) -> bool:
    """Whether a path, as manifests write it, stays in the folder that it starts from."""
    pieces = name.split("/")
    return (
        0 < len(name) < 1000
        and all(0 < len(piece.encode()) < 256 and piece not in (".", "..") for piece in pieces)
        and posixpath.normpath(name) == name
        and not set("\\\0") & set(name)
    )
