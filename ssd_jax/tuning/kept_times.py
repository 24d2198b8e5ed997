"""Round times that were measured once, kept in a folder for the runs after.

A file holds the times of one circumstance: everything that they may depend on. It is read only
where all of that is the same.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from ssd_jax.engine.speculation import RoundTimes, Speculation
from ssd_jax.errors import CheckpointError, ConfigError, RequestError
from ssd_jax.json_files import is_file, read_json_object
from ssd_jax.json_text import to_json
from ssd_jax.model import Model
from ssd_jax.sampling_params import SamplingParams
from ssd_jax.types import ModelParams
from ssd_jax.whole_file import write_whole

SCHEMA = 1
MOST_FILES = 64
_ABANDONED_S = 24 * 3600  # a file still being written after that was left by a killed process
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "NPROC")
_NO_COST = ("max_tokens", "seed", "stop", "stop_token_ids", "ignore_eos")  # fields of a request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Times that were read, and the day (UTC, ISO) on which they were measured."""

    times: RoundTimes
    date: str


def circumstances(
    model: Model, speculation: Speculation, params: SamplingParams, *, batch_size: int = 1
) -> dict[str, Any]:
    """All that round times may depend on, of JSON types.

    Of sampling, which options are used counts, and not their values, which are data to a program.
    """
    fields = {field.name for field in dataclasses.fields(speculation)}
    draft, ngram = speculation.draft, speculation.ngram
    options = {
        name: getattr(speculation, name) for name in fields - {"draft", "ngram", "round_times"}
    }
    unused = SamplingParams()
    used = [
        field.name
        for field in dataclasses.fields(params)
        if field.name not in _NO_COST and getattr(params, field.name) != getattr(unused, field.name)
    ]
    return {
        "target": _about_model(model),
        "draft": None if draft is None else _about_model(draft),
        "ngram": None if ngram is None else dataclasses.asdict(ngram),
        "options": options,
        "sampling": used,
        "batch_size": batch_size,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "precision": str(jax.config.jax_default_matmul_precision),
        "versions": {name: _version(name) for name in ("ssd-jax", "jax", "jaxlib")},
    }


def times_file(folder: Path, about: dict[str, Any]) -> Path:
    """Where the times of these circumstances are."""
    return folder / f"{hashlib.sha256(_canonical(about)).hexdigest()[:32]}.json"


def read_times(folder: Path, about: dict[str, Any]) -> Kept | None:
    """The times that were measured in these circumstances, None if none were.

    Raises:
        ConfigError: the file is not as `keep_times` writes it.
    """
    path = times_file(folder, about)
    if not is_file(path):
        return None
    try:
        content = read_json_object(path)
        date = datetime.date.fromisoformat(content["date"])
        rows = [[math.inf if s is None else s for s in row] for row in content["seconds"]]
        if content["schema"] != SCHEMA or content["about"] != json.loads(_canonical(about)):
            raise ValueError("of other circumstances")
        times = RoundTimes(seconds=tuple(map(tuple, rows)))
    except (CheckpointError, RequestError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Expected round times that were kept in {path}, but they cannot be used; delete it."
        ) from error
    return Kept(times=times, date=date.isoformat())


def keep_times(folder: Path, about: dict[str, Any], times: RoundTimes) -> Path:
    """Write the times for `read_times`, in one go; the file. Of many files the oldest go.

    Raises:
        ConfigError: it cannot be written.
    """
    path = times_file(folder, about)
    content = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": times.seconds,  # infinite ones become null
        "about": about,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to a folder that can."
        ) from error
    write_whole(path, to_json(content, indent=1).encode())
    _prune(folder, path)
    return path


def _prune(folder: Path, newest: Path) -> None:
    """Remove all but the newest files, and what killed processes left."""
    ages: list[tuple[float, Path]] = []
    now = time.time()
    for path in folder.glob("*.json*"):
        try:
            age = now - path.stat().st_mtime
            if path.name.startswith("."):  # as `write_whole` names what it has not finished
                if age > _ABANDONED_S:
                    path.unlink()
            elif path != newest:
                ages.append((age, path))
        except OSError:  # another process was faster
            continue
    for _, path in sorted(ages)[MOST_FILES - 1 :]:
        path.unlink(missing_ok=True)


def _about_model(model: Model) -> dict[str, Any]:
    devices = sorted(model.params.embedding.devices(), key=lambda device: device.id)
    return {
        "config": dataclasses.asdict(model.config),
        "weights": _about_weights(model.params),
        "devices": [len(devices), devices[0].platform, devices[0].device_kind],
        "runtime": devices[0].client.platform_version,
    }


def _about_weights(params: ModelParams) -> list[list[Any]]:
    """Shape, type and sharding of every leaf, in the order of the tree."""
    leaves = jax.tree.leaves(params)
    return [[list(leaf.shape), str(leaf.dtype), str(leaf.sharding)] for leaf in leaves]


def _processor() -> str:
    """The CPU's name in the system: several machines may share a cache folder."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from the source tree
        return None


def _canonical(about: dict[str, Any]) -> bytes:
    return json.dumps(about, sort_keys=True).encode()
