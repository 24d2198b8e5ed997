"""A readable account of what a checkpoint folder holds; no weights are read."""

from pathlib import Path

from ssd_jax.checkpointing.hf_loader import find_problems, open_hf_checkpoint
from ssd_jax.checkpointing.leaves import weight_dtype
from ssd_jax.checkpointing.manifest import MANIFEST_FILE, Manifest, read_manifest
from ssd_jax.checkpointing.orbax_io import PARAMS_FOLDER, check_files
from ssd_jax.config import ModelConfig
from ssd_jax.errors import CheckpointError
from ssd_jax.json_files import is_file
from ssd_jax.text import load_tokenizer

_MAX_LISTED = 5


def describe(folder: Path) -> str:
    """Model, sizes, bytes, tokenizer and origin of a checkpoint in either format, as lines of text.

    Raises:
        CheckpointError: no checkpoint there, or a file that cannot be read.
        ConfigError: an unsupported model.
    """
    if is_file(folder / MANIFEST_FILE):
        manifest = read_manifest(folder)
        rows = _converted_rows(folder, manifest)
        config = manifest.config
    else:
        rows, config = _hf_rows(folder)
    rows = [("folder", str(folder)), *rows, *_model_rows(config), *_tokenizer_rows(folder)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _converted_rows(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    num_bytes = manifest.num_params * weight_dtype(manifest.dtype).itemsize
    origin = [
        ("source file", f"{file.name}, {_bytes(file.size)}, sha256 {file.sha256}")
        for file in manifest.source_files
    ]
    return [
        ("format", f"ssd-jax, version {manifest.format_version} (Orbax)"),
        ("written by", f"{manifest.tool}, {manifest.created}"),
        ("weights", f"{manifest.dtype}, {_bytes(num_bytes)}"),
        *origin,
        _state_of_files(folder, manifest),
    ]


def _state_of_files(folder: Path, manifest: Manifest) -> tuple[str, str]:
    """What their names and sizes tell; contents are for `verify_checkpoint`."""
    try:
        check_files(folder / PARAMS_FOLDER, manifest.params_files)
    except CheckpointError as error:
        return "problem", str(error)
    return "files", f"{len(manifest.params_files)}, all there and of the size that was written"


def _hf_rows(folder: Path) -> tuple[list[tuple[str, str]], ModelConfig]:
    checkpoint = open_hf_checkpoint(folder)
    tensors = checkpoint.tensors.values()
    files = len({tensor.file for tensor in tensors})
    kinds = ", ".join(sorted({tensor.dtype for tensor in tensors}))
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    rows = [
        ("format", f"Hugging Face, {files} safetensors {'file' if files == 1 else 'files'}"),
        ("weights", f"{kinds}, {_bytes(num_bytes)}, loaded as {checkpoint.stored_dtype.name}"),
    ]
    for kind, keys in find_problems(checkpoint).items():
        more = ", ..." if len(keys) > _MAX_LISTED else ""
        listed = ", ".join(keys[:_MAX_LISTED])
        rows.append(("problem", f"{len(keys)} tensors {kind}: {listed}{more}"))
    return rows, checkpoint.config


def _model_rows(config: ModelConfig) -> list[tuple[str, str]]:
    biases = {"qkv": config.qkv_bias, "output": config.output_bias, "mlp": config.mlp_bias}
    scaling = config.rope_scaling
    stretched = f", {scaling.kind} scaling by {scaling.factor:g}" if scaling else ""
    return [
        ("family", config.family),
        ("parameters", f"{config.num_params:,}"),
        ("layers", str(config.num_layers)),
        ("hidden size", f"{config.hidden_size}, feed-forward {config.intermediate_size}"),
        (
            "heads",
            f"{config.num_heads} query, {config.num_kv_heads} key/value, of {config.head_dim}",
        ),
        ("vocabulary", f"{config.vocab_size}{', tied' if config.tied_embeddings else ', untied'}"),
        ("context", f"{config.max_context} tokens"),
        ("rope", f"base {config.rope_theta:g}{stretched}"),
        ("biases", ", ".join(name for name, present in biases.items() if present) or "none"),
        ("q and k norms", "yes" if config.qk_norm else "no"),
    ]


def _tokenizer_rows(folder: Path) -> list[tuple[str, str]]:
    if not (folder / "tokenizer.json").is_file():
        return [("tokenizer", "none (no tokenizer.json)")]
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        return [("tokenizer", f"unusable: {error}")]
    kind = type(tokenizer.backend.model).__name__
    bos = "none" if tokenizer.bos_id is None else str(tokenizer.bos_id)
    eos = ", ".join(map(str, tokenizer.eos_ids)) or "none"
    return [
        ("tokenizer", f"{kind}, {tokenizer.vocab_size} ids, BOS {bos}, EOS {eos}"),
        ("chat template", "no" if tokenizer.chat_template is None else "yes"),
    ]


def _bytes(count: int) -> str:
    """A number of bytes in the largest decimal unit that leaves at least 1."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
