"""Peak memory of a conversion: a synthetic sharded checkpoint, converted in a process of its own.

Usage: python bench/convert_memory.py [--gigabytes 2] [--dtype bfloat16] [--folder DIR]

Prints one JSON record. `peak_over_largest_leaf` is (peak - memory after imports) / largest leaf;
the converter promises about 3. Everything written is removed again.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

from ssd_jax.checkpointing.export import hf_config
from ssd_jax.checkpointing.hf_names import leaf_specs
from ssd_jax.checkpointing.leaves import weight_dtype
from ssd_jax.checkpointing.safetensors_files import CONFIG_FILE, INDEX_FILE
from ssd_jax.config import ModelConfig
from ssd_jax.json_text import to_json

# A child inherits its parent's ru_maxrss; VmHWM, which counts from its own start, it does not.
_REPORT_PEAK = """
import re
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""
_IMPORT = "import orbax.checkpoint, ssd_jax.checkpointing" + _REPORT_PEAK
_CONVERT = (
    """
import sys
from pathlib import Path
import ssd_jax.checkpointing
ssd_jax.checkpointing.convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    + _REPORT_PEAK
)
_MODEL = ModelConfig(
    family="llama",
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=1,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_context=8192,
)


def main() -> None:
    """Make the checkpoint, convert it, print the record."""
    parser = argparse.ArgumentParser(description="Peak memory of a conversion.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the weights, 10^9 B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's)")
    args = parser.parse_args()
    dtype = weight_dtype(args.dtype)
    config = _config_of_size(args.gigabytes * 1e9 / dtype.itemsize)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, destination = Path(folder, "source"), Path(folder, "converted")
        source_bytes = _write_checkpoint(config, dtype, source)
        base_peak = _peak_of_child(_IMPORT)
        start = time.perf_counter()
        peak = _peak_of_child(_CONVERT, source, destination)
        seconds = time.perf_counter() - start
        written = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    specs = leaf_specs(config)
    largest_leaf = max(math.prod(spec.shape) for spec in specs) * dtype.itemsize
    largest_tensor = dtype.itemsize * max(
        math.prod(piece.tensor_shape(spec.shape)) for spec in specs for piece in spec.pieces
    )
    record = {
        "benchmark": "convert_memory",
        "num_layers": config.num_layers,
        "dtype": dtype.name,
        "source_bytes": source_bytes,
        "written_bytes": written,
        "largest_source_tensor_bytes": largest_tensor,
        "largest_leaf_bytes": largest_leaf,
        "peak_rss_bytes_after_imports": base_peak,
        "peak_rss_bytes": peak,
        "peak_over_largest_leaf": round((peak - base_peak) / largest_leaf, 2),
        "seconds": round(seconds, 2),
    }
    print(to_json(record))


def _config_of_size(num_params: float) -> ModelConfig:
    """The model with as many layers as come closest to the number of weights."""
    one = _MODEL.num_params
    per_layer = dataclasses.replace(_MODEL, num_layers=2).num_params - one
    num_layers = max(1, 1 + round((num_params - one) / per_layer))
    return dataclasses.replace(_MODEL, num_layers=num_layers)


def _write_checkpoint(config: ModelConfig, dtype: np.dtype, folder: Path) -> int:
    """Write random weights, one shard for every layer and one for the rest; returns their bytes."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(hf_config(config, dtype)), encoding="utf-8")
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for spec in leaf_specs(config):
        shard = ".".join(spec.name.split(".")[:2]) if spec.name.startswith("layers") else "others"
        shapes = {piece.key: piece.tensor_shape(spec.shape) for piece in spec.pieces}
        shards.setdefault(f"{shard}.safetensors", {}).update(shapes)
    generator = np.random.default_rng(0)
    num_bytes = 0
    for name, shapes in shards.items():
        tensors = {
            key: generator.standard_normal(shape, np.float32).astype(dtype)
            for key, shape in shapes.items()
        }
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        safetensors.numpy.save_file(tensors, folder / name)
    weight_map = {key: name for name, shapes in shards.items() for key in shapes}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return num_bytes


def _peak_of_child(program: str, *arguments: Path) -> int:
    """Largest resident memory, in bytes, that the program reports of itself (Linux)."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
