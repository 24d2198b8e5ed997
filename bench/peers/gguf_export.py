"""A folder in the Hugging Face layout as one GGUF file for llama.cpp.

    python -m bench.peers.gguf_export FOLDER FILE --dtype float32 [--ids-only]

Runs where `gguf`, `safetensors` and `ml_dtypes` are installed. Matrices get the precision asked
for, vectors stay float32, as llama.cpp wants them. `--ids-only` leaves the tokenizer out: see
`gguf_layout.ids_only_fields`.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.gguf_layout import (
    FAMILIES,
    UNKNOWN_SPLITTER,
    Field,
    gguf_name,
    gguf_tensor,
    ids_only_fields,
    model_fields,
    rope_factors,
    tokenizer_fields,
)

KINDS = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}


def main() -> int:
    """Write what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description="Hugging Face folder to GGUF file.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=KINDS, default="float32", help="of matrices (float32)")
    parser.add_argument("--ids-only", action="store_true", help="no tokenizer, nothing ends a text")
    args = parser.parse_args()
    try:
        note = export_gguf(args.folder, args.file, args.dtype, ids_only=args.ids_only)
    except (OSError, ValueError, KeyError) as error:
        print(f"gguf_export: {args.folder} cannot be exported: {error}", file=sys.stderr)
        return 2
    if note:
        print(f"gguf_export: {note}", file=sys.stderr)
    return 0


def export_gguf(folder: Path, file: Path, dtype: str, *, ids_only: bool) -> str | None:
    """Write the file, complete or not at all; a note where the tokenizer is not quite the same."""
    import gguf  # pyright: ignore[reportMissingImports]

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"expected a model of {', '.join(FAMILIES)}, got {family!r}.")
    note = None
    if ids_only:
        vocabulary = ids_only_fields(config["vocab_size"])
    else:
        vocabulary = _read_tokenizer(folder, config)
        if vocabulary["tokenizer.ggml.pre"][1] == UNKNOWN_SPLITTER:
            note = "llama.cpp does not know how this tokenizer splits text: give prompts as ids."
    kind = gguf.GGMLQuantizationType[KINDS[dtype]]
    unfinished = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(unfinished, family)
    try:
        for name, field in (model_fields(config) | vocabulary).items():
            _add_field(writer, name, field)
        for name, tensor in _tensors(folder, config).items():
            own = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(tensor, own)
            writer.add_tensor(name, data, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return note


def _read_tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, Field]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return tokenizer_fields(tokenizer, settings, config)


def _tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor by its GGUF name, float32."""
    import ml_dtypes  # noqa: F401 (numpy learns bfloat16 by it)
    import safetensors.numpy

    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in safetensors.numpy.load_file(path).items():
            found[gguf_name(key)] = gguf_tensor(config, key, tensor.astype(np.float32))
    if not found:
        raise ValueError("expected *.safetensors files in it, found none.")
    if (factors := rope_factors(config)) is not None:
        found["rope_freqs.weight"] = factors
    return found


def _add_field(writer: Any, name: str, field: Field) -> None:  # noqa: ANN401 (gguf is not ours)
    kind, value = field
    if kind in ("strings", "int32s"):
        writer.add_array(name, value)
    else:
        getattr(writer, f"add_{kind}")(name, value)


if __name__ == "__main__":
    sys.exit(main())
